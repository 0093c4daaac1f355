"""The retention set and the drift on it."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms

from pathtune import retention
from pathtune.properties import Structure

SYMBOLS = ["H", "C", "O", "Si", "Cu", "Mg"]


def same(a: list[Atoms], b: list[Atoms]) -> list[bool]:
    return [x == y for x, y in zip(a, b, strict=True)]


def test_equal_seeds_give_equal_structures():
    first = retention.prototypes(SYMBOLS, 40)
    assert all(same(first, retention.prototypes(SYMBOLS, 40)))
    for seed in (1, (1, 0)):
        assert not any(same(first, retention.prototypes(SYMBOLS, 40, seed=seed)))


def test_nonmetals_stand_beside_a_metal():
    found = retention.prototypes(SYMBOLS, 60)
    assert {s for atoms in found for s in atoms.symbols} == set(SYMBOLS)
    assert all(set(atoms.symbols) & {"Si", "Cu", "Mg"} for atoms in found)


def test_without_a_metal_there_are_molecules():
    found = retention.prototypes(["H", "C", "O"], 30)
    assert not any(atoms.pbc.any() for atoms in found)
    assert {s for atoms in found for s in atoms.symbols} == {"H", "C", "O"}
    assert len({atoms.get_chemical_formula() for atoms in found}) > 10
    assert not any(same(found[:-1], found[1:]))


def test_one_nonmetal_alone_has_crystals():
    assert all(atoms.pbc.all() for atoms in retention.prototypes(["C"], 5))


def harmonic(structures):
    """Predict springs to the origin."""
    return [
        {
            "energy": np.array((s.atoms.positions**2).sum()),
            "forces": -2 * s.atoms.positions,
        }
        for s in structures
    ]


def corrupted(energy, force):
    def predict(structures):
        return [
            {
                "energy": p["energy"] + energy * s.n_atoms * (-1) ** s.n_atoms,
                "forces": p["forces"] + force,
            }
            for s, p in zip(structures, harmonic(structures), strict=True)
        ]

    return predict


def test_drift_is_the_mean_size_of_the_change():
    structures = [Structure(a) for a in retention.prototypes(SYMBOLS, 12)]
    nothing = retention.drift(structures, harmonic, harmonic)
    assert nothing["energy_drift_mev_per_atom"] == 0
    assert nothing["forces_drift_mev_per_angstrom"] == 0
    some = retention.drift(structures, harmonic, corrupted(0.01, [0, 0.03, -0.03]))
    # Energies of even and odd cells move apart and must not cancel.
    assert some["energy_drift_mev_per_atom"] == pytest.approx(10)
    assert some["forces_drift_mev_per_angstrom"] == pytest.approx(20)
    sizes = [np.abs(p["forces"]).ravel() for p in harmonic(structures)]
    expected = 1e3 * np.concatenate(sizes).mean()
    assert some["forces_base_mev_per_angstrom"] == pytest.approx(expected)


def test_structures_where_the_base_is_unreasonable_are_left_out():
    far, near = Atoms("Cu", [[9.0, 0, 0]]), Atoms("Cu", [[0.1, 0, 0]])
    structures = [Structure(far), Structure(near)]

    def base(structures):
        return [
            p | {"forces": np.where(p["forces"] < -15, np.nan, p["forces"])}
            for p in harmonic(structures)
        ]

    for predict in (harmonic, base):
        found = retention.drift(structures, predict, corrupted(0.01, 0))
        assert (found["n_structures"], found["n_left_out"]) == (1, 1)
        assert found["forces_base_mev_per_angstrom"] == pytest.approx(200 / 3)
    empty = retention.drift(structures[:1], harmonic, harmonic)
    assert empty == {"n_structures": 0, "n_left_out": 1}
