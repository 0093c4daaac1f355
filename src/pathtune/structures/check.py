"""Checking a data set before anything is trained on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols
from ase.neighborlist import neighbor_list

from pathtune.errors import PathtuneError
from pathtune.properties import Prediction, Property, Structure
from pathtune.structures import magnetic
from pathtune.structures.survey import Survey, directions, survey
from pathtune.structures.units import (
    inconsistent_units,
    is_per_atom,
    suspected_units,
)

Severity = Literal["error", "warning", "note"]

_UNITS: Mapping[Property, str] = {
    "energy": "eV per structure",
    "forces": "eV/Å (minus the gradient)",
    "stress": "eV/Å^3, tension positive",
}
_DUPLICATE = 1e-6  # Å
_LEAK = 1e-4  # Å
_OVERLAP = 0.3  # Å
_SMALL = 400  # atoms up to which all pairs are compared at once
_SAMPLE, _RUN = 2000, 50  # structures whose units are looked at, in runs this long
_ABSURD_FORCE, _LARGE_FORCE = 100.0, 30.0  # eV/Å
_LARGE_STRESS = 1.0  # eV/Å^3, 160 GPa
_LARGE_NET_FORCE, _NET_FORCE = 0.05, 0.002  # eV/Å per atom
_LARGE_MAGMOM = 12.0  # μ_B


@dataclass(frozen=True)
class Finding:
    """One thing found in the data.

    Parameters
    ----------
    severity
        ``"error"`` (do not train on this), ``"warning"`` or ``"note"``.
    code
        Kebab-case name of the check.
    message
        What was found, what is expected, what to do.
    frames
        Indices of the structures concerned; empty where it is the whole set.
    """

    severity: Severity
    code: str
    message: str
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Parameters
    ----------
    findings
        Errors first, then warnings, then notes.
    counts
        Number of structures that carry each label.
    elements
        Symbols in the data, by atomic number.
    n_structures
        Number of structures.
    """

    findings: tuple[Finding, ...] = ()
    counts: Mapping[Property, int] = field(default_factory=dict)
    elements: tuple[str, ...] = ()
    n_structures: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(f.severity != "error" for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, ready for JSON."""
        return {"ok": self.ok, **asdict(self)}


def check(
    structures: Sequence[Structure],
    *,
    elements: Collection[int] | None = None,
    predictions: Sequence[Prediction] | None = None,
    against: Sequence[Structure] | None = None,
) -> Report:
    """Look for what makes training fail or lie: units, duplicates, leaks, geometry.

    Parameters
    ----------
    structures
        The data.
    elements
        Atomic numbers the base model knows; default: do not check.
    predictions
        The base model's predictions, one mapping per structure, empty where there is
        none; they make the test of the units sensitive.
    against
        Structures that must not be among `structures`, e.g. the training part.

    Raises
    ------
    ValueError
        If the numbers of structures and predictions differ.
    """
    if predictions is not None and len(predictions) != len(structures):
        raise ValueError(
            f"{len(predictions)} predictions for {len(structures)} structures"
        )
    table = survey(structures)
    chosen = sample(len(structures))
    findings = [
        *_labels(table),
        *_unpredicted(table, predictions or ()),
        *_units(
            [structures[i] for i in chosen],
            [predictions[i] if predictions else {} for i in chosen],
        ),
        *_magnetism([structures[i] for i in chosen]),
        *_frames(structures, table),
        *_repeats(structures, against or ()),
    ]
    if elements is not None:
        findings += _foreign(table, elements)
    order: tuple[Severity, ...] = ("error", "warning", "note")
    return Report(
        findings=tuple(sorted(findings, key=lambda f: order.index(f.severity))),
        counts=table.counts,
        elements=table.elements,
        n_structures=len(structures),
    )


def sample(n: int) -> list[int]:
    """Return the structures whose units are looked at: all, or runs of neighbours.

    Neighbours in a file are often steps of one trajectory, and those are what shows
    that energies and forces do not belong together.
    """
    if n <= _SAMPLE:
        return list(range(n))
    starts = np.linspace(0, n - _RUN, _SAMPLE // _RUN).astype(int)
    return [int(start) + i for start in starts for i in range(_RUN)]


def spread(
    predictions: Sequence[Prediction], chosen: Sequence[int], n: int
) -> list[Prediction]:
    """Return the predictions of some of n structures; those of the others are empty."""
    found: list[Prediction] = [{}] * n
    for i, prediction in zip(chosen, predictions, strict=True):
        found[i] = prediction
    return found


def require_cells(structures: Sequence[Structure]) -> None:
    """Refuse periodic frames without a cell; no neighbour list can be built for them.

    Raises
    ------
    PathtuneError
        Naming the first such frame.
    """
    for i in np.flatnonzero(survey(structures).is_degenerate)[:1]:
        raise PathtuneError(
            f"{structures[int(i)].source}: a periodic direction has no cell vector, or "
            "the cell has no volume; give the cell or switch pbc off"
        )


def _labels(table: Survey) -> Iterator[Finding]:
    counts = table.counts
    if not any(counts.values()):
        yield Finding(
            "error", "no-labels", "no structure has a label; name the keys of the file"
        )
    for name, count in counts.items():
        if 0 < count < len(table):
            yield Finding(
                "note",
                "partial-labels",
                f"{count} of {len(table)} structures have {name}; the others do "
                f"not enter the {name} loss",
            )


def _unpredicted(table: Survey, predictions: Sequence[Prediction]) -> Iterator[Finding]:
    for name, count in table.counts.items():
        if count and predictions and not any(name in p for p in predictions):
            yield Finding(
                "note",
                "unpredicted-labels",
                f"{count} structures have {name}, which the base model predicts for no "
                "structure; these labels are not trained",
            )


def _units(
    structures: Sequence[Structure], predictions: Sequence[Prediction]
) -> Iterator[Finding]:
    accused = False
    for name, expected in _UNITS.items():
        if units := suspected_units(name, structures, predictions):
            accused = True
            yield Finding(
                "error",
                f"{name}-units",
                f"against the base model, {name} looks like {' or '.join(units)}; "
                f"expected {expected}: convert the labels",
            )
    if is_per_atom([s for s in structures if "energy" in s.labels]):
        accused = True
        yield Finding(
            "error",
            "energy-per-atom",
            "the energy does not grow with the number of atoms, so it looks like eV "
            "per atom; expected the total energy: multiply it by the number of atoms",
        )
    if not accused and (units := inconsistent_units(structures)):
        yield Finding(
            "error",
            "inconsistent-units",
            "energies, forces and stresses of neighbouring frames do not belong "
            f"together, which would be explained by {' or '.join(units)}; expected "
            "eV, eV/Å and eV/Å^3: convert the labels",
        )


def _magnetism(structures: Sequence[Structure]) -> Iterator[Finding]:
    if any({"magmoms", "magforces"} & s.labels.keys() for s in structures):
        yield from (Finding(*found) for found in magnetic.complaints(structures))


def _frames(structures: Sequence[Structure], table: Survey) -> Iterator[Finding]:
    """Look at one structure after the other: geometry, and values out of range."""
    columns = [
        _measure(s, degenerate)
        for s, degenerate in zip(structures, table.is_degenerate, strict=True)
    ]
    overlapping, loose, force, stress, magmom, net = np.reshape(columns, (-1, 6)).T
    yield from _report(
        np.flatnonzero(table.is_degenerate).tolist(),
        "error",
        "degenerate-cell",
        "a periodic direction has no cell vector, or the cell has no volume; give the "
        "cell or switch pbc off",
    )
    yield from _report(
        np.flatnonzero(overlapping).tolist(),
        "error",
        "overlapping-atoms",
        f"two atoms are closer than {_OVERLAP} Å; check the units of positions and "
        "cell, or remove the frame",
    )
    yield from _report(
        np.flatnonzero(loose).tolist(),
        "warning",
        "stress-without-periodicity",
        "a stress label on a frame that is not periodic in three directions means "
        "nothing; leave it out or set pbc",
    )
    yield from _report(
        np.flatnonzero(force > _ABSURD_FORCE).tolist(),
        "warning",
        "absurd-forces",
        f"forces up to {force.max(initial=0.0):.3g} eV/Å, above {_ABSURD_FORCE:g}; "
        "such frames ruin a fit: check their unit, or remove them",
    )
    yield from _report(
        np.flatnonzero((force > _LARGE_FORCE) & (force <= _ABSURD_FORCE)).tolist(),
        "warning",
        "large-forces",
        f"forces above {_LARGE_FORCE:g} eV/Å dominate the loss; check their unit, or "
        "leave the frame out",
    )
    yield from _report(
        np.flatnonzero(stress > _LARGE_STRESS).tolist(),
        "warning",
        "large-stress",
        f"stress up to {stress.max(initial=0.0):.3g} eV/Å^3, above {_LARGE_STRESS:g} "
        "(160 GPa); check that its unit is not GPa, kbar or eV",
    )
    yield from _report(
        np.flatnonzero(magmom > _LARGE_MAGMOM).tolist(),
        "warning",
        "large-magmoms",
        f"magnetic moments up to {magmom.max(initial=0.0):.3g} μ_B, above "
        f"{_LARGE_MAGMOM:g}; check their unit",
    )
    yield from _report(
        np.flatnonzero(net > _LARGE_NET_FORCE).tolist(),
        "warning",
        "net-force",
        f"the forces of a frame sum to up to {net.max(initial=0.0):.3g} eV/Å per atom, "
        "expected zero; check that atoms and forces are in the same order",
    )
    yield from _report(
        np.flatnonzero((net > _NET_FORCE) & (net <= _LARGE_NET_FORCE)).tolist(),
        "note",
        "net-force",
        "the forces of a frame do not sum to zero, which a model with conservative "
        "forces cannot learn; tighten the DFT settings if it matters",
    )


def _repeats(
    structures: Sequence[Structure], against: Sequence[Structure]
) -> Iterator[Finding]:
    yield from _report(
        _equal(structures, (), _DUPLICATE),
        "warning",
        "duplicates",
        "the frame repeats an earlier one (same species, cell and positions); remove "
        "it, or it counts twice",
    )
    yield from _report(
        _equal(structures, against, _LEAK) if against else [],
        "error",
        "leakage",
        "the frame is also in the data it is held against (same species, cell and "
        "positions); remove it from one of the two",
    )


def _foreign(table: Survey, known: Collection[int]) -> Iterator[Finding]:
    foreign = [z for z in range(1, 119) if z not in known]
    atoms = table.compositions[:, [z - 1 for z in foreign]]
    total = atoms[np.unique(table.composition)].sum(axis=0)
    symbols = [chemical_symbols[z] for z, n in zip(foreign, total, strict=True) if n]
    yield from _report(
        np.flatnonzero(atoms.sum(axis=1)[table.composition]).tolist(),
        "error",
        "unknown-elements",
        f"the base model does not know {', '.join(symbols)}; choose another base model "
        "or remove the frames",
    )


def _report(
    frames: Sequence[int], severity: Severity, code: str, message: str
) -> Iterator[Finding]:
    """Yield one finding that counts and names its frames, if there are any."""
    if frames:
        shown = ", ".join(map(str, frames[:3])) + (", ..." if len(frames) > 3 else "")
        where = f"{len(frames)} frame{'s' * (len(frames) > 1)} ({shown}): "
        yield Finding(severity, code, where + message, tuple(frames))


def _measure(s: Structure, degenerate: bool) -> tuple[float, ...]:
    """Return overlap, meaningless stress; largest force, stress, moment; net force."""
    return (
        not degenerate and _overlaps(s),
        "stress" in s.labels and not s.atoms.pbc.all(),
        _largest(s, "forces"),
        _largest(s, "stress"),
        _largest(s, "magmoms"),
        _net_force(s),
    )


def _largest(s: Structure, name: Property) -> float:
    """Return the largest length (stress: component) of a label."""
    label = np.asarray(s.labels.get(name, 0.0))
    length = np.linalg.norm(label, axis=-1) if label.ndim == 2 else np.abs(label)
    return float(np.nanmax(length))


def _net_force(s: Structure) -> float:
    if "forces" not in s.labels or s.n_atoms < 2:
        return 0.0
    return float(np.linalg.norm(s.labels["forces"].sum(axis=0))) / s.n_atoms


def _overlaps(s: Structure) -> bool:
    cell, pbc, n = s.atoms.cell.complete()[:], s.atoms.pbc, s.n_atoms
    inverse = np.linalg.inv(cell)
    # A pair closer than _OVERLAP is its own nearest image by rounding only while the
    # planes of the cell are at least twice that apart.
    heights = 1 / np.linalg.norm(inverse, axis=0)
    if n > _SMALL or (heights[pbc] < 2 * _OVERLAP).any():
        return bool(len(neighbor_list("i", s.atoms, _OVERLAP)))
    step = s.atoms.positions[:, None] - s.atoms.positions
    if pbc.any():
        scaled = step @ inverse
        step = (scaled - np.round(scaled) * pbc) @ cell
    close = (step**2).sum(axis=-1) < _OVERLAP**2
    return int(close.sum()) > n  # every atom is close to itself


def _equal(
    structures: Sequence[Structure], against: Sequence[Structure], tolerance: float
) -> list[int]:
    """Return the structures that equal one of `against`, or an earlier one.

    Structures with other moments are not equal. Projections on fixed directions sort
    the structures so that only neighbours need comparing; the others are not read.
    """
    tables = [survey(structures), *([survey(against)] if against else [])]
    kinds = np.concatenate([table.kinds for table in tables])
    places = np.concatenate([table.places for table in tables])
    sizes = np.concatenate([table.n_atoms for table in tables])
    n = len(structures)
    order = np.lexsort((places[:, 0], kinds))
    edges = np.flatnonzero(np.diff(kinds[order], prepend=-1, append=-1))
    found = np.zeros(len(order), dtype=bool)
    for start, end in pairwise(edges.tolist()):
        members = order[start:end]
        place = places[members]
        n_atoms = int(sizes[members[0]])
        reach = tolerance * np.abs(directions(n_atoms)).sum(axis=0)
        ends = np.searchsorted(place[:, 0], place[:, 0] + reach[0], side="right")
        for k in np.flatnonzero(ends > np.arange(len(members)) + 1):
            others = members[k + 1 : ends[k]]
            first, last = np.minimum(members[k], others), np.maximum(members[k], others)
            repeat = first if against else last
            near = np.abs(place[k + 1 : ends[k], 1] - place[k, 1]) <= reach[1]
            near &= ~found[repeat]
            if against:
                near &= (first < n) & (last >= n)
            for i, j in zip(first[near].tolist(), last[near].tolist(), strict=True):
                other = structures[j] if j < n else against[j - n]
                if _is_same(structures[i], other, tolerance):
                    found[i if against else j] = True
    return np.flatnonzero(found).tolist()


def _is_same(a: Structure, b: Structure, tolerance: float) -> bool:
    """Tell whether species, cell and positions are equal, and no moments differ."""
    if not (
        np.array_equal(a.atoms.numbers, b.atoms.numbers)
        and np.array_equal(a.atoms.pbc, b.atoms.pbc)
    ):
        return False
    gaps = (a.atoms.positions - b.atoms.positions, a.atoms.cell[:] - b.atoms.cell[:])
    near = max(float(np.abs(gap).max()) for gap in gaps) <= tolerance
    return near and _same_moments(a, b)


def _same_moments(a: Structure, b: Structure) -> bool:
    """Tell whether no moments, labels or initial ones, tell the two apart."""
    for first, second in (
        (a.labels.get("magmoms"), b.labels.get("magmoms")),
        tuple(s.atoms.arrays.get("initial_magmoms") for s in (a, b)),
    ):
        if first is None or second is None:
            continue
        if first.shape != second.shape or (np.abs(first - second) > 1e-6).any():
            return False
    return True
