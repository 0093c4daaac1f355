"""Structures for asking what a tuned model has forgotten; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ase.build
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii

from pathtune.errors import UsageError

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
    symbols: Sequence[str], n: int, *, seed: int = 0, max_strain: float = 0.05
) -> list[Atoms]:
    """Return strained and rattled elemental and binary crystals.

    One third is elemental (fcc, bcc, hcp, diamond), the rest binary (rocksalt, CsCl,
    zincblende), with nearest neighbours 0.95 to 1.25 times the sum of the covalent
    radii apart. Nonmetals appear beside a metal only.

    Parameters
    ----------
    symbols
        Elements to draw from; at least one is a metal or a semiconductor.
    n
        Number of structures.
    seed
        Equal seeds give equal structures.
    max_strain
        Largest component of the random strain on top.

    Returns
    -------
    list of Atoms
        Periodic cells of 1 to 4 atoms.

    Raises
    ------
    UsageError
        If all elements are nonmetals.
    """
    generator = np.random.default_rng(seed)
    metals = [s for s in symbols if s not in _NONMETALS]
    if not metals:
        raise UsageError(f"no metal or semiconductor among {', '.join(symbols)}")
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
        spread = generator.uniform(0.01, 0.12)
        atoms.positions += generator.normal(0, spread, atoms.positions.shape)
        atoms.info["config_type"] = prototype
        found.append(atoms)
    return found
