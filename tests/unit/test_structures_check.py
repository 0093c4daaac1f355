import dataclasses
import json
from functools import cache

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.emt import EMT
from ase.units import Bohr, Hartree, kcal, mol
from hypothesis import given
from hypothesis import strategies as st

from pathtune.properties import GPA, KBAR, Structure
from pathtune.structures import check

KCAL = kcal / mol


@cache
def crystals(size):
    """Strained and rattled copper with labels of ASE's effective medium theory."""
    rng = np.random.default_rng(size)
    frames = []
    for i in range(80):
        atoms = make_supercell(bulk("Cu", cubic=True), np.diag([size, 1, 1]))
        strain = rng.normal(scale=0.02, size=(3, 3))
        atoms.set_cell(
            atoms.cell[:] @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True
        )
        atoms.positions += rng.normal(
            scale=0.06 if i % 2 else 0.005, size=atoms.positions.shape
        )
        calculator = EMT()
        labels = {
            "energy": np.array(
                calculator.get_potential_energy(atoms) - 3.5 * len(atoms)
            ),
            "forces": calculator.get_forces(atoms),
            "stress": calculator.get_stress(atoms),
        }
        atoms.calc = None
        frames.append(Structure(atoms, labels, source=f"cu.xyz:{i}"))
    return tuple(frames)


@cache
def base_predictions(size):
    """Like the labels, but 20 % too soft, noisy, and with other atomic energies."""
    rng = np.random.default_rng(7)
    return tuple(
        {
            name: 0.8 * label * (1 + 0.1 * rng.normal(size=label.shape))
            if name != "energy"
            else 0.8 * label - 1000.0 * s.n_atoms
            for name, label in s.labels.items()
        }
        for s in crystals(size)
    )


def spoil(structures, **factors):
    def factor(s, name):
        value = factors.get(name, 1.0)
        return value(s) if callable(value) else value

    return [
        dataclasses.replace(
            s, labels={k: v * factor(s, k) for k, v in s.labels.items()}
        )
        for s in structures
    ]


def codes(report):
    return {f.code for f in report.findings}


def the(report, code):
    (finding,) = [f for f in report.findings if f.code == code]
    return finding


def molecule(positions=((0, 0, 0), (0, 0, 1)), symbols="OH", **labels):
    labels = {k: np.asarray(v, float) for k, v in labels.items()}
    return Structure(Atoms(symbols, positions), labels or {"energy": np.array(1.0)})


# --- units ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_clean_data_is_silent(size):
    for predictions in (None, base_predictions(size)):
        report = check(crystals(size), predictions=predictions)
        assert report.findings == ()
        assert report.ok
        assert report.counts["stress"] == report.n_structures == 80
        assert report.elements == ("Cu",)


SPOILT = [
    ({"forces": 1 / KCAL}, "forces", "kcal/mol/Å"),
    ({"forces": Bohr / Hartree}, "forces", "Hartree/Bohr"),
    ({"forces": -1.0}, "forces", "gradients"),
    ({"energy": 1 / Hartree}, "energy", "Hartree"),
    ({"energy": 1 / KCAL}, "energy", "kcal/mol"),
    ({"energy": -1.0}, "energy", "opposite sign"),
    ({"energy": lambda s: 1 / s.n_atoms}, "energy", "eV per atom"),
    ({"stress": 1 / GPA}, "stress", "GPa"),
    ({"stress": 1 / KBAR}, "stress", "kbar"),
    ({"stress": -1 / KBAR}, "stress", "as VASP prints it"),
    ({"stress": -1.0}, "stress", "opposite sign"),
]


@pytest.mark.parametrize(("factors", "name", "unit"), SPOILT)
def test_a_base_model_reveals_the_unit(factors, name, unit):
    data = spoil(crystals(2), **factors)
    finding = the(check(data, predictions=base_predictions(2)), f"{name}-units")
    assert finding.severity == "error"
    assert unit in finding.message and "expected" in finding.message


@pytest.mark.parametrize(("factors", "name", "unit"), SPOILT)
def test_the_labels_reveal_the_unit_among_themselves(factors, name, unit):
    finding = the(check(spoil(crystals(2), **factors)), "inconsistent-units")
    assert name in finding.message and unit in finding.message


def test_units_that_agree_with_each_other_need_a_base_model():
    data = spoil(crystals(1), energy=1 / Hartree, forces=Bohr / Hartree)
    data = [
        dataclasses.replace(s, labels={k: s.labels[k] for k in ("energy", "forces")})
        for s in data
    ]
    assert check(data).ok
    assert {"energy-units", "forces-units"} == codes(
        check(data, predictions=base_predictions(1))
    )


def test_predictions_of_a_part_of_the_frames_suffice():
    data = spoil(crystals(1), forces=1 / KCAL)
    some = [p if i % 4 == 0 else {} for i, p in enumerate(base_predictions(1))]
    assert "forces-units" in codes(check(data, predictions=some))
    assert "forces-units" not in codes(check(data, predictions=[{}] * 80))


def test_a_bad_base_model_raises_no_alarm():
    rng = np.random.default_rng(0)
    noise = [
        {k: rng.normal(size=v.shape) / 30 for k, v in s.labels.items()}
        for s in crystals(1)
    ]
    assert check(crystals(1), predictions=noise).ok
    softened = [{"forces": p["forces"] / 3} for p in base_predictions(1)]
    assert check(crystals(1), predictions=softened).ok


def test_energies_per_atom_do_not_grow():
    mixed = [*crystals(1), *crystals(2)]
    assert check(mixed).ok
    report = check(spoil(mixed, energy=lambda s: 1 / s.n_atoms))
    assert the(report, "energy-per-atom").severity == "error"
    offset = [
        dataclasses.replace(s, labels={"energy": s.labels["energy"] - 5e4 * s.n_atoms})
        for s in mixed
    ]
    assert check(offset).ok  # all-electron total energies prove nothing


# --- repeats ----------------------------------------------------------------------


def shifted(s, step):
    atoms = s.atoms.copy()
    atoms.positions += step
    return dataclasses.replace(s, atoms=atoms)


def test_duplicates():
    data = list(crystals(1)[:6])
    data += [shifted(data[2], 5e-7), shifted(data[4], 5e-5)]
    finding = the(check(data), "duplicates")
    assert finding.severity == "warning" and finding.frames == (6,)


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 99), st.booleans())
def test_repeats_against_brute_force(picks, seed, jitter):
    rng = np.random.default_rng(seed)
    pool = crystals(1)[:6]
    data = [shifted(pool[i], rng.uniform(-4e-7, 4e-7, (4, 3)) * jitter) for i in picks]
    expected = tuple(k for k, i in enumerate(picks) if i in picks[:k])
    found = [f for f in check(data).findings if f.code == "duplicates"]
    assert (found[0].frames if found else ()) == expected
    leak = [f for f in check(data, against=pool[:2]).findings if f.code == "leakage"]
    assert (leak[0].frames if leak else ()) == tuple(
        k for k, i in enumerate(picks) if i < 2
    )


def test_leakage():
    train, valid = (
        crystals(1)[:20],
        [*crystals(1)[20:40], shifted(crystals(1)[3], 5e-5)],
    )
    report = check(valid, against=train)
    assert the(report, "leakage").frames == (20,)
    assert not report.ok and "remove it from one" in the(report, "leakage").message
    assert check(valid[:-1], against=train).ok
    assert "leakage" not in codes(check(valid))


def test_other_moments_make_another_structure():
    def spins(*moments, initial=None):
        s = molecule(magmoms=moments) if moments else molecule()
        if initial:
            s.atoms.set_initial_magnetic_moments(initial)
        return s

    up, down = spins(1, 1), spins(1, -1)
    assert codes(check([up, down], against=[spins(-1, -1)])) == set()
    assert "duplicates" in codes(check([up, up]))
    assert "duplicates" in codes(check([up, spins()]))  # nothing tells them apart
    assert "leakage" in codes(check([up], against=[spins(1, 1)]))
    first, second = spins(initial=[1, 1]), spins(initial=[1, -1])
    assert codes(check([first, second])) == set()


# --- geometry and values ----------------------------------------------------------


def periodic(cell, positions, pbc=True):
    atoms = Atoms(f"Cu{len(positions)}", positions, cell=cell, pbc=pbc)
    return Structure(atoms, {"energy": np.array(1.0)})


@pytest.mark.parametrize(
    ("cell", "positions", "pbc"),
    [
        (None, [[0, 0, 0], [0, 0, 0.2]], False),
        ([4, 4, 4], [[0, 0, 0.05], [0, 0, 3.9]], True),
        ([[4, 0, 0], [3.9, 1, 0], [0, 0, 4]], [[0, 0, 0], [3.9, 1.1, 0]], True),
        ([4, 4, 0.2], [[0, 0, 0]], True),
        ([4, 4, 400], [[0, 0, z] for z in [*range(0, 401)][:-1]] + [[0, 0, 0.1]], True),
    ],
)
def test_overlapping_atoms(cell, positions, pbc):
    report = check([molecule(), periodic(cell, positions, pbc)])
    finding = the(report, "overlapping-atoms")
    assert finding.severity == "error" and finding.frames == (1,)


def test_near_atoms_that_do_not_overlap():
    apart = [
        periodic([4, 4, 4], [[0, 0, 0.05], [0, 0, 3.9]], pbc=[True, True, False]),
        periodic([4, 4, 4], [[0, 0, 0], [0, 0, 0.5]]),
        periodic([4, 4, 0.5], [[0, 0, 0]]),
    ]
    assert check(apart).ok


@pytest.mark.parametrize("cell", [None, [4, 4, 0], [[4, 0, 0], [4, 0, 0], [0, 0, 4]]])
def test_periodic_without_a_cell(cell):
    finding = the(check([periodic(cell, [[0, 0, 0]])]), "degenerate-cell")
    assert finding.severity == "error" and finding.frames == (0,)


@pytest.mark.parametrize(
    ("labels", "code", "severity"),
    [
        ({"forces": [[0, 0, 150], [0, 0, -150]]}, "absurd-forces", "warning"),
        ({"forces": [[0, 0, 50], [0, 0, -50]]}, "large-forces", "warning"),
        ({"forces": [[0, 0, 1], [0, 0, 1]]}, "net-force", "warning"),
        ({"forces": [[0, 0, 1], [0, 0, -0.99]]}, "net-force", "note"),
        ({"magmoms": [0, 20]}, "large-magmoms", "warning"),
        ({"magmoms": [[0, 0, 0], [0, 9, 9]]}, "large-magmoms", "warning"),
        ({"stress": [0] * 6}, "stress-without-periodicity", "warning"),
        ({"stress": [0, 0, 2, 0, 0, 0]}, "large-stress", "warning"),
    ],
)
def test_values_out_of_range(labels, code, severity):
    report = check([molecule(**labels)])
    assert the(report, code).severity == severity
    assert the(report, code).frames == (0,)
    assert report.ok == (severity != "error")


def test_unknown_elements():
    data = [molecule(), molecule(symbols="OPu")]
    finding = the(check(data, elements={1, 8}), "unknown-elements")
    assert "Pu" in finding.message and finding.frames == (1,)
    assert check(data, elements={1, 8, 94}).ok


def test_labels_that_are_missing():
    assert the(check([molecule(charges=1.0)]), "no-labels").severity == "error"
    report = check([molecule(), molecule(symbols="OC", magmoms=[1, 1])])
    notes = [f for f in report.findings if f.code == "partial-labels"]
    assert report.ok and len(notes) == 2
    assert "1 of 2 structures have energy" in notes[0].message


def test_the_report_is_plain_data_with_errors_first():
    report = check([molecule([[0] * 3] * 2, forces=[[0, 0, 150]] * 2), molecule()])
    assert [f.severity for f in report.findings] == sorted(
        (f.severity for f in report.findings),
        key=["error", "warning", "note"].index,
    )
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False and plain["n_structures"] == 2
    assert plain["elements"] == ["H", "O"]
    assert plain["findings"][0]["code"] == "overlapping-atoms"
    assert plain["findings"][0]["frames"] == [0]


def test_predictions_must_match_the_structures():
    with pytest.raises(ValueError, match="1 predictions for 2 structures"):
        check([molecule(), molecule()], predictions=[{}])


def test_no_structures():
    assert codes(check([])) == {"no-labels"}
