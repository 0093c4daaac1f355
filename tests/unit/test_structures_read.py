import hashlib
import os
import struct

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from hypothesis import given
from hypothesis import strategies as st

from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import Structure
from pathtune.structures import (
    fingerprint,
    label_counts,
    read,
    write_predictions,
)

VOIGT = np.array([1.0, 2.0, 3.0, 0.4, 0.5, 0.6])  # xx, yy, zz, yz, xz, xy
FULL = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])
FORCES = np.array([[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])


def water_pair(**info):
    atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1]], cell=[2, 3, 4], pbc=True)
    atoms.info.update(info)
    return atoms


def write(path, frames):
    ase.io.write(path, frames, format="extxyz")
    return path


def one(path, **options):
    (structure,) = read(path, **options)
    return structure


def text(line="energy=-1.0", columns="forces:R:3", second="H 0 0 1 0 0 0"):
    return (
        f'2\nLattice="2 0 0 0 3 0 0 0 4" Properties=species:S:1:pos:R:3:{columns} '
        f"{line}\nO 0 0 0 0 0 0\n{second}\n"
    )


# --- where labels are found -------------------------------------------------------


def test_reference_keys(tmp_path):
    atoms = water_pair(REF_energy=-3.0, REF_stress=FULL, tag="x")
    atoms.set_array("REF_forces", FORCES)
    atoms.set_array("REF_magmoms", np.array([2.0, -1.0]))
    s = one(write(tmp_path / "a.xyz", atoms))
    assert set(s.labels) == {"energy", "forces", "stress", "magmoms"}
    assert s.labels["energy"] == -3.0 and s.labels["energy"].shape == ()
    np.testing.assert_allclose(s.labels["forces"], FORCES)
    np.testing.assert_allclose(s.labels["stress"], VOIGT)
    np.testing.assert_allclose(s.labels["magmoms"], [2.0, -1.0])
    assert all(v.dtype == np.float64 for v in s.labels.values())
    assert s.atoms.calc is None and s.source == "a.xyz:0"
    assert s.atoms.info == {"tag": "x"}
    assert set(s.atoms.arrays) == {"numbers", "positions"}


@pytest.mark.parametrize("suffix", ["xyz", "xyz.gz", "traj", "db"])
def test_calculator_results(tmp_path, suffix):
    atoms = water_pair()
    atoms.calc = SinglePointCalculator(
        atoms, energy=-3.0, forces=FORCES, stress=VOIGT, magmoms=np.array([2.0, -1.0])
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "db":
        with connect(path) as database:
            database.write(atoms)
    else:
        ase.io.write(path, atoms)
    labels = one(path).labels
    assert labels["energy"] == -3.0
    np.testing.assert_allclose(labels["forces"], FORCES)
    np.testing.assert_allclose(labels["stress"], VOIGT)
    np.testing.assert_allclose(labels["magmoms"], [2.0, -1.0])


def test_the_free_energy_belongs_to_the_forces(tmp_path):
    both = text("energy=-1.0 free_energy=-2.0")
    (tmp_path / "a.xyz").write_text(both)
    assert one(tmp_path / "a.xyz").labels["energy"] == -2.0
    (tmp_path / "b.xyz").write_text(both + text())
    assert [s.labels["energy"] for s in read(tmp_path / "b.xyz")] == [-1.0, -1.0]


def test_two_levels_of_theory_are_never_mixed(tmp_path):
    (tmp_path / "a.xyz").write_text(text("REF_energy=5.0 energy=1.0") + text())
    first, second = read(tmp_path / "a.xyz")
    assert first.labels["energy"] == 5.0
    assert set(second.labels) == {"forces"}
    assert label_counts([first, second]) == {
        "energy": 1, "forces": 2, "stress": 0, "magmoms": 0, "magforces": 0,
    }  # fmt: skip


def test_a_key_of_the_user_comes_first(tmp_path):
    atoms = water_pair(REF_energy=-3.0, e=-4.0, w=-24 * VOIGT)
    atoms.set_array("f", FORCES)
    path = write(tmp_path / "a.xyz", atoms)
    labels = one(path, keys={"energy": "e", "forces": "f"}).labels
    assert labels["energy"] == -4.0
    np.testing.assert_allclose(labels["forces"], FORCES)


def test_keys_in_a_database(tmp_path):
    with connect(tmp_path / "a.db") as database:
        database.write(
            water_pair(), key_value_pairs={"e_dft": -4.0}, data={"f_dft": FORCES}
        )
    keys = {"energy": "e_dft", "forces": "f_dft"}
    labels = one(tmp_path / "a.db", keys=keys).labels
    assert labels["energy"] == -4.0
    np.testing.assert_allclose(labels["forces"], FORCES)


@pytest.mark.parametrize("form", [VOIGT, FULL, FULL.reshape(9)])
@pytest.mark.parametrize(
    ("key", "factor", "named"),
    [
        ("REF_stress", 1.0, None),
        ("my_stress", 1.0, {"stress": "my_stress"}),
        ("REF_virials", -24.0, None),  # the volume is 24 Å^3
        ("my_virial", -24.0, {"stress": "my_virial"}),
    ],
)
def test_stress_and_virial_forms(tmp_path, form, key, factor, named):
    path = write(tmp_path / "a.xyz", water_pair(**{key: factor * form}))
    np.testing.assert_allclose(one(path, keys=named).labels["stress"], VOIGT)


def test_vector_and_initial_moments(tmp_path):
    atoms = water_pair()
    atoms.set_array("REF_magmoms", FORCES)
    atoms.set_initial_magnetic_moments([1.0, -1.0])
    s = one(write(tmp_path / "a.xyz", atoms))
    np.testing.assert_allclose(s.labels["magmoms"], FORCES)
    np.testing.assert_allclose(s.atoms.get_initial_magnetic_moments(), [1, -1])


def test_weights_and_config_types(tmp_path):
    frames = [
        water_pair(
            REF_energy=1.0, config_weight=2, config_forces_weight=0.5, group="bulk"
        ),
        water_pair(REF_energy=1.0, config_type="slab", group="bulk"),
        water_pair(REF_energy=1.0),
    ]
    a, b, c = read(write(tmp_path / "a.xyz", frames))
    assert (a.weight, dict(a.property_weights)) == (2.0, {"forces": 0.5})
    assert a.term_weight("forces") == 1.0 and a.term_weight("energy") == 2.0
    assert (c.weight, dict(c.property_weights)) == (1.0, {})
    assert [s.config_type for s in (a, b, c)] == ["bulk", "slab", "default"]


# --- what is refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Empty file"),
        ("\n\n", "holds no structure"),
        (text()[:-15], r"a\.xyz:0: ASE cannot read this frame"),
        (text() + text()[:-15], r"a\.xyz:1: ASE cannot read this frame"),
        (text() + "2\n", r"a\.xyz:1: ASE cannot read this frame"),
        (text(second="Qq 0 0 1 0 0 0"), r"a\.xyz:0: .*unknown species or key 'Qq'"),
        (text() + text(second="X 0 0 1 0 0 0"), r"a\.xyz:1: atom 1 has the symbol 'X'"),
        (text(second="H 0 b 1 0 0 0"), r"a\.xyz:0: .*'b'"),
        (text(second="H 0 nan 1 0 0 0"), r"a\.xyz:0: a position is not finite"),
        (text() + text(second="H 0 0 1 0 inf 0"), r"a\.xyz:1: forces is not finite"),
        (text("energy=nan"), r"a\.xyz:0: energy is not finite"),
        (text("REF_energy=low"), r"a\.xyz:0: energy 'low' is not a number"),
        (text('REF_energy="1 2"'), r"energy has shape \(2,\), expected \(\)"),
        (text('REF_stress="1 2"'), r"stress has shape \(2,\)"),
        (
            text(columns="forces:R:2:a:R:1"),
            r"forces has shape \(2, 2\), expected \(2, 3\) for 2 atoms",
        ),
        (text("REF_stress='1 2 3 4 5 6 7 8 9'"), "stress is not symmetric"),
        (text("config_weight=-1"), r"a\.xyz:0: config_weight is -1\.0"),
        (text("config_energy_weight=nan"), "config_energy_weight is nan"),
        (text("config_weight=heavy"), "config_weight 'heavy' is not a number"),
        ("0\nenergy=1\n", r"a\.xyz:0: the frame has no atoms"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "a.xyz").write_text(content)
    with pytest.raises(PathtuneError, match=message) as caught:
        read(tmp_path / "a.xyz")
    assert "a.xyz" in str(caught.value)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.npz", "vasprun.xml", "OUTCAR", "a.db", "a.traj", "a.json", "a.xyz.gz"],
)
def test_unreadable_formats(tmp_path, name):
    (tmp_path / name).write_text("nothing of the kind\n")
    with pytest.raises(PathtuneError, match=f"{name}:0: ASE cannot read"):
        read(tmp_path / name)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(PathtuneError, match=r"none\.xyz does not exist"):
        read(tmp_path / "none.xyz")
    with pytest.raises(PathtuneError, match="is a directory"):
        read(tmp_path)


def test_a_stress_needs_a_volume(tmp_path):
    molecule = Atoms("OH", [[0, 0, 0], [0, 0, 1]])
    molecule.info["REF_stress"] = VOIGT
    path = write(tmp_path / "a.xyz", [water_pair(REF_stress=VOIGT), molecule])
    with pytest.raises(PathtuneError, match=r"a\.xyz:1: .*without volume"):
        read(path)


def test_no_label_at_all(tmp_path):
    path = write(tmp_path / "a.xyz", water_pair(energies_dft=1.0))
    with pytest.raises(PathtuneError) as caught:
        read(path)
    for part in ("no frame has a label", "REF_energy", "REF_virials", "energies_dft'"):
        assert part in str(caught.value)
    assert one(path, allow_unlabelled=True).labels == {}


def test_a_wrong_or_missing_key_names_the_nearest(tmp_path):
    path = write(tmp_path / "a.xyz", water_pair(REF_energy=1.0, stress_dft=VOIGT))
    with pytest.raises(
        PathtuneError, match=r"'REF_enrgy'; the file has .* mean 'REF_energy'"
    ):
        read(path, keys={"energy": "REF_enrgy"})
    with pytest.raises(
        PathtuneError, match=r"no frame has stress under 'stress'.*'stress_dft'"
    ):
        read(path, keys={"stress": "stress"})
    with pytest.raises(UsageError, match=r"unknown property 'force'.*'forces'"):
        read(path, keys={"force": "f"})


# --- fingerprint and writing ------------------------------------------------------


def structure(**change):
    base = {
        "atoms": water_pair(),
        "labels": {"energy": np.array(1.0), "forces": FORCES.copy()},
    }
    return Structure(**(base | change))


def test_fingerprint_sees_the_data_only():
    moved, stretched, molecule = water_pair(), water_pair(), water_pair(tag=1)
    moved.positions[0, 0] += 1e-7
    stretched.cell[0, 0] += 1e-7
    molecule.pbc = False
    reference = fingerprint([structure()])
    assert fingerprint([structure(source="x:3", weight=2.0)]) == reference
    negative_zero = water_pair()
    negative_zero.positions *= np.where(negative_zero.positions == 0, -1.0, 1.0)
    assert fingerprint([structure(atoms=negative_zero)]) == reference
    others = [
        [structure(atoms=moved)],
        [structure(atoms=stretched)],
        [structure(atoms=molecule)],
        [structure(labels={"energy": np.array(1.0)})],
        [structure(labels={"energy": np.array(1.5), "forces": FORCES})],
        [structure(), structure()],
        [],
    ]
    assert len({reference, *map(fingerprint, others)}) == len(others) + 1
    pair = [structure(), structure(atoms=moved)]
    assert fingerprint(pair) != fingerprint(pair[::-1])


def test_the_fingerprint_is_the_same_on_every_platform():
    atoms = Atoms("H", [[-0.0, 0.5, 1.0]])
    s = Structure(atoms, {"energy": np.array(-1.0)})
    data = (
        (b"numbers(1,);", "<q", 1),
        (b"positions(1, 3);", "<3d", 0.0, 0.5, 1.0),
        (b"cell(3, 3);", "<9d", *[0.0] * 9),
        (b"pbc(3,);", "<3q", 0, 0, 0),
        (b"energy();", "<d", -1.0),
    )
    spelt_out = b"".join(name + struct.pack(*packed) for name, *packed in data)
    one = hashlib.sha256(spelt_out).digest()
    assert fingerprint([s]) == hashlib.sha256(one).hexdigest()
    assert fingerprint([s, s]) == hashlib.sha256(one + one).hexdigest()


@given(st.floats(-1e6, 1e6), st.booleans())
def test_predictions_round_trip(tmp_path_factory, energy, compress):
    folder = tmp_path_factory.mktemp("out")
    path = folder / ("p.xyz.gz" if compress else "p.xyz")
    s = structure(
        atoms=water_pair(config_weight=2.0, tag="a b", nested={"x": 1}),
        labels={
            "energy": np.array(energy),
            "forces": FORCES,
            "stress": VOIGT,
            "magmoms": np.array([1.0, 2.0]),
        },
    )
    prediction = {
        "energy": np.array(energy + 1), "forces": -FORCES, "stress": 2 * VOIGT,
    }  # fmt: skip
    write_predictions(path, [s], [prediction])
    assert os.listdir(folder) == [path.name]
    written = ase.io.read(path)
    assert written.get_potential_energy() == pytest.approx(energy + 1, rel=1e-12)
    np.testing.assert_allclose(written.get_forces(), -FORCES)
    np.testing.assert_allclose(written.get_stress(), 2 * VOIGT)
    assert written.info["pathtune_energy"] == written.get_potential_energy()
    np.testing.assert_allclose(written.info["pathtune_stress"], 2 * VOIGT)
    np.testing.assert_allclose(written.arrays["pathtune_forces"], -FORCES)
    again = one(path)
    assert again.weight == 2.0 and again.atoms.info["tag"] == "a b"
    assert again.labels.keys() == s.labels.keys()
    for name, label in s.labels.items():
        np.testing.assert_allclose(again.labels[name], label, rtol=1e-12, atol=1e-8)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.xyz"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        write_predictions(path, [structure()], [])
    with pytest.raises(ValueError, match="wrong length"):
        write_predictions(path, [structure()], [{"forces": np.zeros((3, 3))}])
    assert os.listdir(tmp_path) == ["p.xyz"] and path.read_text() == "old"
