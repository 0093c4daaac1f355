"""What a tuned model has forgotten: structures to ask it about, and its drift there.

Nothing is downloaded, and no label is needed: the base model is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ase.build
import numpy as np
from ase import Atoms
from ase.collections import g2
from ase.data import atomic_numbers, covalent_radii

from pathtune.properties import Prediction, Structure

Predict = Callable[[Sequence[Structure]], Sequence[Prediction]]

#: Setting ``retention`` -> number of structures.
SIZES: Mapping[str, int] = {"none": 0, "fast": 40, "large": 400}
#: eV/Å; where the base predicts more, its own word is worth little.
LARGEST_FORCE = 15.0

# Prototype -> lattice constant over the distance between nearest neighbours.
_ELEMENTAL: Mapping[str, float] = {
    "fcc": 2**0.5,
    "bcc": 2 / 3**0.5,
    "hcp": 1.0,
    "diamond": 4 / 3**0.5,
}
_BINARY: Mapping[str, float] = {
    "rocksalt": 2.0,
    "cesiumchloride": 2 / 3**0.5,
    "zincblende": 4 / 3**0.5,
}
# No close-packed solids: two of these never share a crystal here.
_NONMETALS = {"H", "He", "B", "C", "N", "O", "F", "Ne", "P", "S", "Cl", "Ar", "Se"}
_NONMETALS |= {"Br", "Kr", "I", "Xe", "Rn"}


def prototypes(
    symbols: Sequence[str],
    n: int,
    *,
    seed: int | Sequence[int] = 0,
    max_strain: float = 0.05,
) -> list[Atoms]:
    """Return strained and rattled elemental and binary crystals.

    One third is elemental (fcc, bcc, hcp, diamond), the rest binary (rocksalt, CsCl,
    zincblende), with nearest neighbours 0.95 to 1.25 times the sum of the covalent
    radii apart. Nonmetals appear beside a metal only; where there is none, the
    structures are rattled molecules of the G2 set.

    Parameters
    ----------
    symbols
        Elements to draw from.
    n
        Number of structures.
    seed
        Equal seeds give equal structures.
    max_strain
        Largest component of the random strain on top.

    Returns
    -------
    list of Atoms
        Periodic cells of 1 to 4 atoms, or molecules.
    """
    generator = np.random.default_rng(seed)
    metals = [s for s in symbols if s not in _NONMETALS]
    if not metals and (known := _molecules(symbols)):
        chosen = generator.integers(len(known), size=n)
        return [_rattled(known[i].copy(), generator) for i in chosen]
    metals = metals or list(symbols)
    found = []
    for index in range(n):
        elemental = len(symbols) < 2 or index % 3 == 0
        table = _ELEMENTAL if elemental else _BINARY
        names = [str(generator.choice(metals))]
        if not elemental:
            names.append(str(generator.choice([s for s in symbols if s != names[0]])))
        radii = [covalent_radii[atomic_numbers[name]] for name in names]
        prototype = str(generator.choice(list(table)))
        distance = 2 * float(np.mean(radii)) * generator.uniform(0.95, 1.25)
        build: Callable[..., Atoms] = ase.build.bulk
        atoms = build(
            "".join(names),
            prototype,
            a=table[prototype] * distance,
            cubic=prototype == "fcc",
        )
        strain = generator.uniform(-max_strain, max_strain, (3, 3))
        strain = (strain + strain.T) / 2
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        atoms.info["config_type"] = prototype
        found.append(_rattled(atoms, generator))
    return found


def _molecules(symbols: Sequence[str]) -> list[Atoms]:
    """Return the molecules of the G2 set that are made of some elements."""
    return [a for a in g2 if len(a) > 1 and set(a.symbols) <= set(symbols)]


def _rattled(atoms: Atoms, generator: np.random.Generator) -> Atoms:
    spread = generator.uniform(0.01, 0.12)
    atoms.positions += generator.normal(0, spread, atoms.positions.shape)
    return atoms


def reasonable(predictions: Sequence[Prediction]) -> list[int]:
    """Return which predictions have no force above `LARGEST_FORCE`."""
    largest = [np.linalg.norm(p["forces"], axis=1).max() for p in predictions]
    return [i for i, force in enumerate(largest) if force <= LARGEST_FORCE]


def drift(
    structures: Sequence[Structure], base: Predict, tuned: Predict
) -> dict[str, Any]:
    """Return how far a tuned model is from its base where it had no data.

    Parameters
    ----------
    structures
        Where to compare; those where the base is not `reasonable` are left out.
    base, tuned
        Predict energies and forces, both without shifts of reference energies.

    Returns
    -------
    dict
        ``n_structures`` and ``n_left_out``; mean absolute differences of the energies
        per atom (``energy_drift_mev_per_atom``) and of the force components
        (``forces_drift_mev_per_angstrom``), and the mean size of the base's own
        (``forces_base_mev_per_angstrom``).
    """
    predicted = base(structures)
    kept = reasonable(predicted)
    counts = {"n_structures": len(kept), "n_left_out": len(structures) - len(kept)}
    if not kept:
        return counts
    before, chosen = [predicted[i] for i in kept], [structures[i] for i in kept]
    after = tuned(chosen)
    pairs = list(zip(before, after, strict=True))
    energies = [
        float(b["energy"] - a["energy"]) / s.n_atoms
        for s, (a, b) in zip(chosen, pairs, strict=True)
    ]
    forces = np.concatenate([(b["forces"] - a["forces"]).ravel() for a, b in pairs])
    size = np.concatenate([p["forces"].ravel() for p in before])
    return counts | {
        "energy_drift_mev_per_atom": 1e3 * float(np.abs(energies).mean()),
        "forces_drift_mev_per_angstrom": 1e3 * float(np.abs(forces).mean()),
        "forces_base_mev_per_angstrom": 1e3 * float(np.abs(size).mean()),
    }
