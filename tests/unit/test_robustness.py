"""Short-range curves and simulations, on potentials known to be good and bad."""

from __future__ import annotations

import ase.build
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.data import covalent_radii

from pathtune import robustness
from pathtune.properties import Structure
from pathtune.structures import survey


def pair_potential(push):
    """Predict dimers; `push` is the repulsion (eV/Å) at a distance, by symbols."""

    def predict(structures):
        predictions = []
        for s in structures:
            bond = s.atoms.positions[1] - s.atoms.positions[0]
            distance = np.linalg.norm(bond)
            reduced = distance / covalent_radii[s.atoms.numbers].sum()
            force = push("".join(s.atoms.symbols), reduced) * bond / distance
            predictions.append({"forces": np.stack([-force, force])})
        return predictions

    return predict


PAIRS = [("H", "H"), ("H", "O"), ("Cu", "O")]


def test_a_repulsive_core_has_no_hole():
    wall = pair_potential(lambda pair, x: x**-13)
    assert robustness.holes(wall, PAIRS) == []


@pytest.mark.parametrize("depth", [300.0, np.nan])
def test_a_narrow_hole_of_one_pair_is_found(depth):
    def push(pair, x):
        return x**-3 - (depth if pair == "HO" and abs(x - 0.53) < 0.006 else 0)

    assert robustness.holes(pair_potential(push), PAIRS) == [("H", "O")]


def test_an_attraction_farther_out_is_a_bond_and_no_hole():
    bond = pair_potential(lambda pair, x: 0.7 - x)
    collapse = pair_potential(lambda pair, x: 0.55 - x)
    assert robustness.holes(bond, PAIRS) == []
    assert robustness.holes(collapse, PAIRS) == PAIRS


def test_pairs_are_those_of_one_frame_the_most_frequent_first():
    formulas = ["H2O", "H2O", "HO", "CuO", "Ne", "H2"]
    found = robustness.pairs(survey([Structure(Atoms(f)) for f in formulas]))
    assert found[0] in {("H", "H"), ("O", "O")}
    assert ("H", "O") in found[:3]
    assert set(found[3:]) == {("O", "Cu"), ("Cu", "Cu"), ("Ne", "Ne")}


def copper():
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def changed(change):
    """EMT with other forces."""

    class Changed(EMT):
        def calculate(self, atoms=None, *args, **options):
            super().calculate(atoms, *args, **options)
            self.results["forces"] = change(atoms, self.results["forces"])

    return Changed()


def test_a_sound_potential_conserves_energy():
    start = copper()
    before = start.copy()
    found = robustness.nve(start, EMT(), n_steps=100)
    assert (found["n_atoms"], found["n_steps"], found["time_step_fs"]) == (4, 100, 1)
    assert not found["exploded"]
    assert abs(found["energy_drift_mev_per_atom_per_ps"]) < 0.5
    assert start == before and start.calc is None and not start.get_momenta().any()


def test_forces_that_are_no_gradient_drift():
    heated = changed(lambda atoms, forces: forces + 0.2 * atoms.get_velocities())
    found = robustness.nve(copper(), heated, n_steps=100)
    assert not found["exploded"]
    assert found["energy_drift_mev_per_atom_per_ps"] > 20


@pytest.mark.parametrize(
    "change",
    [
        lambda atoms, forces: 50 * (atoms.positions - atoms.positions.mean(axis=0)),
        lambda atoms, forces: forces * np.nan,
    ],
)
def test_an_unstable_potential_explodes_and_stops(change):
    found = robustness.nve(copper(), changed(change), n_steps=100)
    assert found["exploded"] and found["n_steps"] < 50
    assert found["energy_drift_mev_per_atom_per_ps"] is None


def test_hydrogen_halves_the_time_step():
    found = robustness.nve(ase.build.molecule("H2O"), EMT(), n_steps=2)
    assert found["time_step_fs"] == 0.5


def test_curves_are_relative_to_the_largest_distance():
    def predicting(depth):
        def predict(structures):
            bonds = [s.atoms.get_distance(0, 1) for s in structures]
            return [{"energy": np.array(depth / x - 7.0)} for x in bonds]

        return predict

    found = robustness.curves(predicting(1.0), predicting(2.0), [("H", "O")] * 9)
    assert len(found) == robustness.MOST_CURVES
    curve = found[0]
    x = np.array(curve["distances_angstrom"])
    assert curve["pair"] == "H-O"
    assert x / curve["covalent_angstrom"] == pytest.approx(robustness.CURVE)
    assert curve["base_energy_ev"] == pytest.approx(1 / x - 1 / x[-1])
    assert curve["energy_ev"] == pytest.approx(2 / x - 2 / x[-1])
