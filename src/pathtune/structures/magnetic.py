"""Magnetic data: moments as input of a model, checks, the scale of magnetic forces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import Literal, NamedTuple

import numpy as np
from ase.units import Hartree, Rydberg

from pathtune.errors import PathtuneError
from pathtune.properties import Structure, moment_vectors
from pathtune.structures.store import Lazy, Store

# Two frames are neighbours where no moment differs by more than this share of the
# largest one: for a rotation 17 degrees, which the trapezoid rule still integrates.
_NEAR = 0.3
_MIN_PAIRS, _MIN_DETERMINED = 5, 0.9
_AGREE = 0.15  # relative
_TINY = 0.01  # μ_B
_MANY = 10  # moments
_MAX_FRAMES = 400  # per composition, in the quadratic search for neighbours

# The size of each unit in eV/μ_B; a negative size is the opposite sign.
UNITS: Mapping[str, float] = {
    "meV/μ_B": 1e-3,
    "Rydberg/μ_B": Rydberg,
    "Hartree/μ_B": Hartree,
    "eV/μ_B with the opposite sign (gradients)": -1.0,
}


def magnetised(structures: Sequence[Structure], scale: float) -> Sequence[Structure]:
    """Return structures ready for a model that takes moments as input.

    An atom's labelled moment becomes its initial one; where there is no label the
    initial moment of the file stays, or is zero. Structures of a store stay in their
    file.

    Parameters
    ----------
    structures
        As read.
    scale
        What the labels of magnetic forces are multiplied with.
    """
    if isinstance(structures, Lazy):
        return Store(lambda i: _magnetised(structures[i], scale), len(structures))
    return [_magnetised(s, scale) for s in structures]


def _magnetised(s: Structure, scale: float) -> Structure:
    labels = dict(s.labels)
    if "magforces" in labels and scale != 1:
        labels["magforces"] = scale * labels["magforces"]
    atoms = s.atoms
    if "magmoms" in labels:
        label = moment_vectors(labels["magmoms"])
        there = np.isfinite(label).all(axis=1)
        known = moment_vectors(atoms.get_initial_magnetic_moments())
        atoms = atoms.copy()
        atoms.set_initial_magnetic_moments(None)  # ASE keeps the shape otherwise
        atoms.set_initial_magnetic_moments(np.where(there[:, None], label, known))
    return replace(s, atoms=atoms, labels=labels)


def has_spins(s: Structure) -> bool:
    """Whether a structure has a moment, labelled or initial, that is not zero."""
    label = np.asarray(s.labels.get("magmoms", 0.0))
    return bool(
        np.nan_to_num(label).any() or s.atoms.get_initial_magnetic_moments().any()
    )


def unmagnetised(structures: Sequence[Structure]) -> list[int]:
    """Return the structures without any moment, where others have some."""
    without = [i for i, s in enumerate(structures) if not has_spins(s)]
    return without if len(without) < len(structures) else []


@dataclass(frozen=True)
class Scale:
    """The factor between magnetic-force labels and the slope of the energy.

    Parameters
    ----------
    factor
        What the labels have to be multiplied with.
    error
        Its standard error.
    n_pairs
        Pairs of neighbouring frames it comes from.
    determined
        Share of the variance of the energy differences, the work of the forces taken
        off, that it explains.
    """

    factor: float
    error: float
    n_pairs: int
    determined: float

    @property
    def is_telling(self) -> bool:
        """Whether the pairs are enough, and agree."""
        return self.n_pairs >= _MIN_PAIRS and self.determined >= _MIN_DETERMINED


class Complaint(NamedTuple):
    """What looks wrong; see `pathtune.structures.Finding`."""

    severity: Literal["error", "warning"]
    code: str
    message: str


class _Work(NamedTuple):
    magnetic: float
    rest: float


def scale_of_magforces(structures: Sequence[Structure]) -> Scale:
    """Compare magnetic forces with the energies of neighbouring frames.

    Between frames of one composition and cell whose moments hardly differ the energy
    changes by ``dE = -F.dR - c H.dm``, trapezoid rule; c is fitted by least squares.

    Parameters
    ----------
    structures
        With energies, forces, moments and magnetic forces; the others do not count.
    """
    pairs = np.array(list(_pairs(structures))).reshape(-1, 2)
    x, y = pairs.T
    if len(pairs) < 2 or not x.any():
        return Scale(1.0, np.inf, len(pairs), 0.0)
    factor = float(x @ y / (x @ x))
    rest = y - factor * x
    error = float(np.sqrt(rest @ rest / (len(x) - 1) / (x @ x)))
    return Scale(factor, error, len(x), 1 - float(rest @ rest / (y @ y)))


def fit_scale(structures: Sequence[Structure]) -> Scale:
    """Return `scale_of_magforces`; refuse one that the data do not determine.

    Raises
    ------
    PathtuneError
        If there are too few neighbouring frames, or they do not agree on one factor.
    """
    found = scale_of_magforces(structures)
    if not found.is_telling or found.factor <= 0:
        raise PathtuneError(
            "magforces_scale=fit: the factor between magnetic forces and energies "
            f"cannot be fitted: {found.n_pairs} pairs of training frames have moments "
            f"near enough (at least {_MIN_PAIRS} are needed), and a factor of "
            f"{found.factor:.3g} explains {100 * found.determined:.0f} % of their "
            f"energy differences (at least {100 * _MIN_DETERMINED:.0f} % are needed). "
            "Give the factor as a number, 1 where labels and energies agree"
        )
    return found


def complaints(structures: Sequence[Structure]) -> Iterator[Complaint]:
    """Yield what looks wrong with magnetic labels."""
    moments = [
        np.asarray(s.labels["magmoms"]) for s in structures if "magmoms" in s.labels
    ]
    forms = {label.ndim for label in moments}
    if len(forms) > 1:
        n = sum(label.ndim == 1 for label in moments)
        yield Complaint(
            "warning",
            "mixed-moments",
            f"{n} of {len(moments)} structures have one number for each moment, the "
            "others a vector; the numbers count as moments along z: give vectors "
            "everywhere if their axis is another one",
        )
    lengths = [np.linalg.norm(moment_vectors(label), axis=1) for label in moments]
    sizes = np.concatenate([np.zeros(0), *lengths])
    sizes = sizes[sizes > 0]  # NaN is not
    if len(sizes) and sizes.max() < _TINY:
        yield Complaint(
            "warning",
            "tiny-moments",
            f"all moments are below {sizes.max():.1e}; expected μ_B: check their unit "
            "(1 μ_B = 9.27e-24 J/T), or leave them out where nothing is magnetic",
        )
    elif len(sizes) >= _MANY and np.abs(2 * sizes - np.round(2 * sizes)).max() < 1e-6:
        yield Complaint(
            "warning",
            "formal-moments",
            "all moments are multiples of 1/2; these look like formal spins (in ħ), "
            "starting values or directions: expected the moments of the calculation in "
            "μ_B, about twice the spin",
        )
    alone = sum("magforces" in s.labels and not has_spins(s) for s in structures)
    if alone:
        yield Complaint(
            "warning",
            "magforces-without-moments",
            f"{alone} structures have magnetic forces and no moments; a force belongs "
            "to the moments it acts on: name their key with --magmoms-key",
        )
    found = scale_of_magforces(structures)
    if not found.is_telling or abs(found.factor - 1) < _AGREE:
        return
    said = (
        f"{found.n_pairs} pairs of neighbouring frames have energy differences "
        f"{found.factor:.3g} ± {found.error:.1g} times the work of the magnetic forces"
    )
    for unit, size in UNITS.items():
        if abs(found.factor / size - 1) < _AGREE:
            yield Complaint(
                "error",
                "magforces-units",
                f"{said}, so these look like {unit}; expected eV/μ_B: convert them",
            )
            return
    yield Complaint(
        "warning",
        "magforces-scale",
        f"{said}; expected 1. Labels and energies cannot both be learned: train with "
        "--set magforces_scale=fit, or with the factor you know",
    )


def _pairs(structures: Sequence[Structure]) -> Iterator[_Work]:
    """Yield the magnetic work, and the energy difference less that of forces."""
    needed = {"energy", "forces", "magmoms", "magforces"}

    def key(s: Structure) -> tuple[bytes, bytes, bytes]:
        cell = np.round(s.atoms.cell[:], 6) + 0.0
        return s.atoms.numbers.tobytes(), s.atoms.pbc.tobytes(), cell.tobytes()

    usable = sorted((s for s in structures if needed <= s.labels.keys()), key=key)
    for _, members in groupby(usable, key=key):
        group = list(members)[:_MAX_FRAMES]
        moments = np.array([moment_vectors(s.labels["magmoms"]) for s in group])
        magforces = np.array([s.labels["magforces"] for s in group])
        if not (np.isfinite(moments).all() and np.isfinite(magforces).all()):
            continue
        sizes = np.linalg.norm(moments, axis=-1)
        cell, pbc = group[0].atoms.cell.complete()[:], group[0].atoms.pbc
        for i, j in combinations(range(len(group)), 2):
            a, b, turn = group[i], group[j], moments[j] - moments[i]
            if np.linalg.norm(turn, axis=-1).max() > _NEAR * sizes[[i, j]].max():
                continue
            scaled = np.linalg.solve(cell.T, (b.atoms.positions - a.atoms.positions).T)
            step = (scaled.T - np.round(scaled.T) * pbc) @ cell
            force = (a.labels["forces"] + b.labels["forces"]) / 2
            gain = float(b.labels["energy"] - a.labels["energy"])
            yield _Work(
                -float(((magforces[i] + magforces[j]) / 2 * turn).sum()),
                gain + float((force * step).sum()),
            )
