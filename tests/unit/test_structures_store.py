"""Structures that stay in their file are the structures of a list."""

from __future__ import annotations

import ase.db
import ase.io
import numpy as np
import pytest

from pathtune.errors import PathtuneError
from pathtune.properties import Structure
from pathtune.structures import (
    check,
    estimate,
    fingerprint,
    isolated,
    label_counts,
    read,
    require_cells,
    sample,
    survey,
    take,
)
from pathtune.structures.store import Store
from tests.conftest import crystals, molecules


def frames():
    """Structures with different labels and cells, one repeated, a lone atom."""
    made = [*crystals(6), *molecules(5)]
    made[3].info["config_weight"] = 0.0
    del made[4].info["REF_stress"]
    lone = ase.Atoms("Cu")
    lone.info |= {"REF_energy": -2.0, "config_type": "IsolatedAtom"}
    lone.arrays["REF_forces"] = np.zeros((1, 3))
    return [*made, lone, made[1].copy()]


@pytest.fixture(params=["a.xyz", "a.db"])
def both(request, tmp_path):
    """Return the same file as a list and as a store."""
    path = tmp_path / request.param
    if path.suffix == ".xyz":
        ase.io.write(path, frames())
    else:
        with ase.db.connect(str(path)) as database:
            for atoms in frames():
                arrays = {"REF_forces": atoms.arrays.pop("REF_forces")}
                database.write(atoms, data=dict(atoms.info) | arrays)
    listed, stored = read(path), read(path, stream_above=0)
    assert isinstance(listed, list) and isinstance(stored, Store)
    return listed, stored


def same(a, b):
    assert a.atoms == b.atoms and a.source == b.source
    assert a.labels.keys() == b.labels.keys()
    for name in a.labels:
        np.testing.assert_array_equal(a.labels[name], b.labels[name])
    assert (a.weight, a.config_type) == (b.weight, b.config_type)
    assert a.label_keys == b.label_keys


def test_a_store_is_the_list(both):
    listed, stored = both
    assert len(stored) == len(listed) == 13
    for a, b in zip(listed, stored, strict=True):
        same(a, b)
    for a, b in zip(listed[2:9:3], stored[2:9:3], strict=True):
        same(a, b)
    same(stored[-1], listed[-1])
    with pytest.raises(IndexError):
        stored[13]
    for a, b in zip(*(take(s, [5, 0, 11]) for s in both), strict=True):
        same(a, b)


def test_a_store_has_the_answers_of_the_list(both):
    listed, stored = both
    assert fingerprint(stored) == fingerprint(listed)
    assert label_counts(stored) == label_counts(listed)
    assert check(stored) == check(listed)
    assert {"duplicates", "partial-labels"} <= {f.code for f in check(stored).findings}
    base = np.linspace(-1, 1, len(listed))
    assert estimate(stored, base) == estimate(listed, base)
    rows = [11, 0, 1, 2]
    energies = {"Cu": -1.0}
    some, others = take(stored, rows), take(listed, rows)
    assert isolated(some, energies) == isolated(others, energies)
    assert fingerprint(some) == fingerprint(others) != fingerprint(take(listed, [0]))
    assert check(some) == check(others)
    assert survey(some).label_keys == survey(others).label_keys
    leaks = check(take(stored, [0, 1]), against=take(stored, [2, 12])).findings
    assert [f.frames for f in leaks if f.code == "leakage"] == [(1,)]


def test_a_survey_of_some_structures_is_theirs(both):
    for chosen in ([0, 3, 9], [11], [], list(range(13))):
        part, own = survey(both[1]).take(chosen), survey([both[0][i] for i in chosen])
        assert part.elements == own.elements
        assert part.counts == own.counts
        assert part.fingerprint == own.fingerprint
        for name in ("energy", "forces", "stress"):
            np.testing.assert_array_equal(part.rows(name), own.rows(name))


def test_rows_of_the_loss_leave_out_what_weighs_nothing(both):
    rows = survey(both[1]).rows
    assert rows("energy").sum() == 12  # of 13, one weighs nothing
    assert rows("stress").sum() == 5  # 5 crystals are left, one is there twice
    assert rows("forces", [0, 3, 6]).tolist() == [4, 0, 6]


def test_the_survey_is_made_once(both):
    _, stored = both
    first = stored.survey
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "__iter__", None)
        assert survey(stored) is first
        assert label_counts(stored)["energy"] == 13
        require_cells(stored)


def test_large_data_are_sampled_in_runs_of_neighbours():
    assert sample(2000) == list(range(2000))
    chosen = sample(100_000)
    assert len(chosen) == len(set(chosen)) == 2000
    assert chosen[0] == 0 and chosen[-1] == 99_999
    assert chosen[:50] == list(range(50))


def test_a_database_with_gaps(tmp_path):
    path = tmp_path / "a.db"
    with ase.db.connect(str(path)) as database:
        for atoms in crystals(4):
            database.write(atoms, data=atoms.info)
        del database[2]
    stored = read(path, stream_above=0)
    energies = [float(s.labels["energy"]) for s in stored]
    expected = [crystals(4)[i].info["REF_energy"] for i in (0, 2, 3)]
    assert energies == pytest.approx(expected, abs=1e-12)


def test_a_database_in_lmdb(tmp_path):
    pytest.importorskip("ase_db_backends")
    path = tmp_path / "a.aselmdb"
    with ase.db.connect(str(path)) as database:
        for atoms in molecules(4):
            arrays = {"REF_forces": atoms.arrays["REF_forces"]}
            database.write(atoms, data=atoms.info | arrays)
    stored = read(path, stream_above=0)
    assert isinstance(stored, Store)
    assert label_counts(stored)["forces"] == 4


def test_a_damaged_frame_is_named(tmp_path):
    path = tmp_path / "a.xyz"
    ase.io.write(path, molecules(3))
    content = path.read_text()
    for spoilt, frame in (
        (content[:-20], 2),
        (content + "two\n", 3),
        (content + "7\n", 3),
        (content.replace("C ", "Qq ", 1), 0),
    ):
        path.write_text(spoilt)
        for above in (0, 64):
            with pytest.raises(PathtuneError, match=rf"a\.xyz:{frame}: ASE cannot"):
                read(path, stream_above=above)
    path.write_text("\n")
    with pytest.raises(PathtuneError, match="holds no structure"):
        read(path, stream_above=0)


def test_what_cannot_be_read_frame_by_frame_is_kept_in_memory(tmp_path):
    path = tmp_path / "a.xyz.gz"
    ase.io.write(path, molecules(3), format="extxyz")
    assert isinstance(read(path, stream_above=0), list)


def test_one_structure_many_times():
    data = [Structure(molecules(1)[0], {"energy": np.array(1.0)}) for _ in range(300)]
    (finding,) = [f for f in check(data).findings if f.code == "duplicates"]
    assert finding.frames == tuple(range(1, 300))
