"""Shifts per element that move a base model's energies to the user's DFT energies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import yaml
from ase.data import atomic_numbers, chemical_symbols

from pathtune.errors import PathtuneError, unknown
from pathtune.properties import Structure
from pathtune.structures.survey import survey

_SYMBOLS = chemical_symbols[1:]  # without X
_SAME_ATOM = 1e-3  # eV


@dataclass(frozen=True)
class ReferenceEnergies:
    """What is added to the base model's energy for each atom of an element.

    Parameters
    ----------
    shifts
        eV per atom, by symbol, in order of the atomic number.
    rank
        Rank of the compositions the shifts were fitted to; the number of elements
        where nothing was fitted.
    n_elements
        Number of elements.
    warning
        What the user should know about the fit.
    """

    shifts: Mapping[str, float]
    rank: int
    n_elements: int
    warning: str | None = None


def foundation(structures: Sequence[Structure]) -> ReferenceEnergies:
    """Keep the base model's own reference energies: every shift is zero."""
    return _exact(dict.fromkeys(survey(structures).elements, 0.0))


def estimate(
    structures: Sequence[Structure], base_energies: Sequence[float] | np.ndarray
) -> ReferenceEnergies:
    """Fit the shifts to the base model's energy residuals.

    The shifts minimise ``||E_ref - E_base - N @ shifts||`` over the structures with an
    energy, N being the numbers of atoms by element; where the compositions leave them
    undetermined, the solution of smallest norm is taken and a warning set.

    Parameters
    ----------
    structures
        Structures without an energy are not part of the fit.
    base_energies
        Total energies of the base model, eV, one per structure.

    Raises
    ------
    ValueError
        If the numbers of structures and energies differ.
    PathtuneError
        If no structure has an energy, an element occurs only in structures without
        one, or a base energy is not finite.
    """
    if len(base_energies) != len(structures):
        raise ValueError(
            f"{len(base_energies)} energies for {len(structures)} structures"
        )
    return _fit(structures, survey(structures).energies - np.asarray(base_energies))


def average(
    structures: Sequence[Structure], base_reference_energies: Mapping[str, float]
) -> ReferenceEnergies:
    """Fit new reference energies to the total energies alone.

    Parameters
    ----------
    structures
        Structures without an energy are not part of the fit.
    base_reference_energies
        Energies of lone atoms in the base model, eV, by symbol.

    Raises
    ------
    PathtuneError
        As in `estimate`, or if the base model lacks an element.
    """
    fitted = _fit(structures, survey(structures).energies)
    shifts = {
        e: energy - _base(base_reference_energies, e)
        for e, energy in fitted.shifts.items()
    }
    return ReferenceEnergies(shifts, fitted.rank, fitted.n_elements, fitted.warning)


def isolated(
    structures: Sequence[Structure], base_atom_energies: Mapping[str, float]
) -> ReferenceEnergies:
    """Take the shifts from the user's DFT calculations of lone atoms.

    A lone atom is a frame of one atom that is not periodic or has the config type
    ``IsolatedAtom``.

    Parameters
    ----------
    structures
        The data, lone atoms among them.
    base_atom_energies
        Energies of lone atoms in the base model, eV, by symbol.

    Raises
    ------
    PathtuneError
        If an element of the data has no lone atom with an energy, two that disagree,
        or none in the base model, or if a frame tagged ``IsolatedAtom`` has several
        atoms.
    """
    table = survey(structures)
    atoms: dict[str, float] = {}
    for i in np.flatnonzero(table.is_tagged | table.is_lone_atom).tolist():
        s = structures[i]
        if s.n_atoms != 1:
            raise PathtuneError(
                f"{s.source}: the frame is tagged IsolatedAtom but has {s.n_atoms} "
                "atoms; correct its config_type"
            )
        if "energy" not in s.labels:
            continue
        symbol, energy = s.atoms.symbols[0], float(s.labels["energy"])
        if abs(atoms.setdefault(symbol, energy) - energy) > _SAME_ATOM:
            raise PathtuneError(
                f"{s.source}: a second isolated {symbol} atom has {energy} eV, the "
                f"first {atoms[symbol]} eV; keep one of them"
            )
    elements = table.elements
    if missing := [e for e in elements if e not in atoms]:
        raise PathtuneError(
            f"no isolated atom with an energy for {', '.join(missing)}; add a frame of "
            "one atom with config_type=IsolatedAtom, or estimate the reference energies"
        )
    return _exact({e: atoms[e] - _base(base_atom_energies, e) for e in elements})


def from_file(
    path: str | PathLike[str], base_reference_energies: Mapping[str, float]
) -> ReferenceEnergies:
    """Read new reference energies from a JSON or YAML mapping of symbols to eV.

    Parameters
    ----------
    path
        The file; elements that `base_reference_energies` lacks are checked and left
        out.
    base_reference_energies
        Energies of lone atoms in the base model, eV, for the elements of the data.

    Raises
    ------
    PathtuneError
        If the file cannot be read, is no mapping, lacks an element, has a symbol that
        is none, or a value that is not a finite number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PathtuneError(
            f"{path}: cannot read the reference energies ({error}); expected a JSON or "
            "YAML mapping of symbols to eV"
        ) from error
    if not isinstance(content, dict):
        raise PathtuneError(f"{path}: expected a mapping of symbols to energies in eV")
    for symbol, value in content.items():
        if symbol not in _SYMBOLS:
            # YAML 1.1 reads an unquoted No (nobelium) as a truth value.
            raise PathtuneError(f"{path}: {unknown('element', str(symbol), _SYMBOLS)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and np.isfinite(value)):
            raise PathtuneError(
                f"{path}: the energy of {symbol} is {value!r}, expected a number in eV"
            )
    if missing := [e for e in base_reference_energies if e not in content]:
        raise PathtuneError(
            f"{path}: no energy for {', '.join(missing)}; add it in eV per atom"
        )
    return _exact(
        {
            e: content[e] - _base(base_reference_energies, e)
            for e in content
            if e in base_reference_energies
        }
    )


def _fit(structures: Sequence[Structure], targets: np.ndarray) -> ReferenceEnergies:
    """Fit energies by element to `targets`, looking at labelled structures only."""
    table = survey(structures)
    labelled = np.flatnonzero(table.labelled["energy"])
    if not len(labelled):
        raise PathtuneError("no structure has an energy to fit reference energies to")
    elements = table.take(labelled).elements
    if missing := [e for e in table.elements if e not in elements]:
        raise PathtuneError(
            f"{', '.join(missing)} occurs only in structures without an energy, so its "
            "reference energy cannot be fitted; add energies or give it in a file"
        )
    if len(bad := labelled[~np.isfinite(targets[labelled])]):
        raise PathtuneError(
            f"{structures[int(bad[0])].source}: the base model's energy is not finite; "
            "remove the frame"
        )
    # Structures of one composition are one equation, as heavy as there are many.
    used, place, counts = np.unique(
        table.composition[labelled], return_inverse=True, return_counts=True
    )
    means = np.bincount(place, weights=targets[labelled]) / counts
    atoms = table.compositions[used][:, [atomic_numbers[e] - 1 for e in elements]]
    heavy = np.sqrt(counts)
    shifts, _, rank, _ = np.linalg.lstsq(
        heavy[:, None] * atoms, heavy * means, rcond=None
    )
    warning = None
    if rank < len(elements):
        warning = (
            f"the compositions determine only {rank} of {len(elements)} reference "
            f"energies ({', '.join(elements)}); the smallest shifts were taken, which "
            "is exact for these compositions only: add frames of other compositions or "
            "isolated atoms to compare across compositions"
        )
    return ReferenceEnergies(
        dict(zip(elements, shifts.tolist(), strict=True)),
        int(rank),
        len(elements),
        warning,
    )


def _exact(shifts: Mapping[str, float]) -> ReferenceEnergies:
    ordered = sorted(shifts, key=atomic_numbers.__getitem__)
    return ReferenceEnergies(
        {e: float(shifts[e]) for e in ordered}, len(shifts), len(shifts)
    )


def _base(energies: Mapping[str, float], element: str) -> float:
    if element not in energies:
        raise PathtuneError(
            f"the base model gives no energy for a lone {element} atom; it covers "
            f"{', '.join(energies) or 'no element'}"
        )
    return float(energies[element])
