"""Orderings: frames of one structure that differ in their spins, and their energies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pathtune.errors import UsageError
from pathtune.properties import Structure, moment_vectors
from pathtune.structures.survey import directions, survey

TOLERANCE = 1e-3  # Å, of positions and cell
RESOLVED = 1e-3  # meV/atom; a smaller spread is rounding


def groups(structures: Sequence[Structure], key: str | None = None) -> list[list[int]]:
    """Return the frames that are orderings of one structure, in their order.

    Parameters
    ----------
    structures
        Frames; those without moments, labelled or initial, are left out.
    key
        Key of ``info`` with equal values for the orderings of one structure, or
        ``formula`` for the reduced formula; by default the species, cells and positions
        have to be equal.

    Returns
    -------
    list
        Groups of at least two frames whose moments are not all the same.

    Raises
    ------
    UsageError
        If no frame has the key.
    """
    spins = {i: m for i, s in enumerate(structures) if (m := _spins(s)).any()}
    if key is None:
        found = _by_geometry(structures, list(spins))
    else:
        values: dict[Hashable, list[int]] = defaultdict(list)
        for i in spins:
            if (value := _value(structures[i], key)) is not None:
                values[value].append(i)
        if not values:
            raise UsageError(
                f"no frame with moments has {key!r} in its info; give a key that the "
                "orderings of one structure share, or 'formula'"
            )
        found = list(values.values())
    return [g for g in found if any(_differ(spins[g[0]], spins[i]) for i in g[1:])]


def compare(
    structures: Sequence[Structure], energies: Sequence[float], key: str | None = None
) -> dict[str, Any] | None:
    """Compare predicted with labelled energies of the orderings of each structure.

    Parameters
    ----------
    structures, key
        See `groups`.
    energies
        Predicted, eV, one for each frame.

    Returns
    -------
    dict or None
        ``n_groups``, ``n_structures``; where frames have energies the mean absolute
        error of the differences within a group
        (``difference_mae_mev_per_atom``), the labels' mean absolute difference
        (``difference_size_mev_per_atom``) and Spearman's rank correlation, averaged
        over the groups with their sizes (``spearman``, None where a prediction does not
        distinguish the orderings at all); ``groups``: of each its ``frames`` with their
        energies relative to their mean (meV/atom), ``predicted`` and ``labelled``, and
        its ``spearman``. None where no frames are orderings of one structure.
    """
    found = [_group(structures, energies, rows) for rows in groups(structures, key)]
    if not found:
        return None
    result: dict[str, Any] = {
        "n_groups": len(found),
        "n_structures": sum(len(g["frames"]) for g in found),
    }
    labelled = [g for g in found if g["labelled"]]
    if labelled:
        pairs = [_differences(g["predicted"], g["labelled"]) for g in labelled]
        predicted, expected = np.concatenate(pairs, axis=1)
        result["difference_mae_mev_per_atom"] = float(
            np.abs(predicted - expected).mean()
        )
        result["difference_size_mev_per_atom"] = float(np.abs(expected).mean())
        ranked = [g for g in labelled if g["spearman"] is not None]
        result["spearman"] = (
            float(
                np.average(
                    [g["spearman"] for g in ranked],
                    weights=[len(g["frames"]) for g in ranked],
                )
            )
            if ranked
            else None
        )
    return result | {"groups": found}


def _spins(s: Structure) -> np.ndarray:
    """Return the moments that tell orderings apart, (n_atoms, 3); 0 where unknown."""
    known = s.labels.get("magmoms", s.atoms.get_initial_magnetic_moments())
    return np.nan_to_num(moment_vectors(np.asarray(known)))


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape != b.shape or bool(np.abs(a - b).max() > 1e-6)


def _value(s: Structure, key: str) -> Hashable:
    if key == "formula":
        return str(s.atoms.symbols.formula.reduce()[0].convert("hill"))
    value = s.atoms.info.get(key)
    return value if isinstance(value, Hashable) else str(value)


def _by_geometry(structures: Sequence[Structure], rows: list[int]) -> list[list[int]]:
    """Group frames of equal species, cell and positions.

    Projections on fixed directions leave few frames to compare with each other.
    """
    table = survey(structures)
    order = sorted(rows, key=lambda i: (table.kinds[i], table.places[i, 0]))
    found: list[list[int]] = []
    near: list[tuple[float, list[int]]] = []  # projection and group, still in reach
    for i in order:
        place = float(table.places[i, 0])
        reach = TOLERANCE * float(np.abs(directions(int(table.n_atoms[i]))).sum(0)[0])
        near = [(p, g) for p, g in near if 0 <= place - p <= reach]
        for _, group in near:
            if _is_same(structures[group[0]], structures[i]):
                group.append(i)
                break
        else:
            found.append([i])
            near.append((place, found[-1]))
    return sorted((sorted(g) for g in found if len(g) > 1), key=lambda g: g[0])


def _is_same(a: Structure, b: Structure) -> bool:
    if not (
        np.array_equal(a.atoms.numbers, b.atoms.numbers)
        and np.array_equal(a.atoms.pbc, b.atoms.pbc)
    ):
        return False
    gaps = (a.atoms.positions - b.atoms.positions, a.atoms.cell[:] - b.atoms.cell[:])
    return max(float(np.abs(gap).max()) for gap in gaps) <= TOLERANCE


def _group(
    structures: Sequence[Structure], energies: Sequence[float], rows: Sequence[int]
) -> dict[str, Any]:
    n_atoms = np.array([structures[i].n_atoms for i in rows])
    predicted = _centred([energies[i] for i in rows] / n_atoms)
    labels = [structures[i].labels.get("energy", np.nan) for i in rows]
    labelled = _centred(np.array(labels, dtype=float) / n_atoms)
    known = bool(np.isfinite(labelled).all())
    return {
        "frames": list(rows),
        "predicted": predicted.tolist(),
        "labelled": labelled.tolist() if known else None,
        "spearman": _spearman(predicted, labelled) if known else None,
    }


def _centred(energies: np.ndarray) -> np.ndarray:
    return 1e3 * (energies - energies.mean())


def _spearman(predicted: np.ndarray, labelled: np.ndarray) -> float | None:
    if min(np.ptp(predicted), np.ptp(labelled)) < RESOLVED:
        return None
    return float(spearmanr(predicted, labelled).statistic)


def _differences(*energies: Sequence[float]) -> np.ndarray:
    """Return the differences of all pairs, one row for each kind of energy."""
    i, j = np.triu_indices(len(energies[0]), 1)
    return np.array([np.asarray(e)[j] - np.asarray(e)[i] for e in energies])
