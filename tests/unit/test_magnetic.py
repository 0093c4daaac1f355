"""Magnetic data around the spin layer: input, checks, orderings, files; no backend."""

from __future__ import annotations

import ase
import ase.io
import numpy as np
import pytest
import torch

from pathtune import orderings, structures
from pathtune.config import RunConfig, validate
from pathtune.delta import Delta, sparsity
from pathtune.deltafile import Change, DeltaFile
from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import Structure
from pathtune.structures.magnetic import scale_of_magforces

NAN = float("nan")
FIELD = 0.02  # eV/μ_B^2


def spiral(n: int = 8, factor: float = 1.0, step: float = 0.15) -> list[Structure]:
    """Return frames of E = FIELD m1.m2 whose second moment turns; H is E'/factor."""
    frames = []
    for index in range(n):
        angle = step * index
        m = 1.7 * np.array([[0, 0, 1], [np.sin(angle), 0, np.cos(angle)]])
        atoms = ase.Atoms("Fe2", [[0, 0, 0], [0, 0, 2]])
        labels = {
            "energy": np.array(FIELD * m[0] @ m[1]),
            "forces": np.zeros((2, 3)),
            "magmoms": m,
            "magforces": -FIELD * m[::-1] / factor,
        }
        frames.append(Structure(atoms, labels, source=f"spiral:{index}"))
    return frames


def codes(frames) -> dict[str, str]:
    findings = structures.check(frames).findings
    return {f.code: f.message for f in findings}


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
def test_scale_is_that_of_the_labels(factor):
    found = scale_of_magforces(spiral(factor=factor))
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.n_pairs >= 5 and found.is_telling
    message = codes(spiral(factor=factor)).get("magforces-scale", "")
    assert ("magforces_scale=fit" in message) == (factor != 1)


def test_forces_take_their_share_of_the_energy_across_a_boundary():
    frames = spiral(factor=1.4)
    for index, s in enumerate(frames):
        s.atoms.set_cell([9, 9, 9])
        s.atoms.pbc = True
        s.atoms.positions[1, 0] = -0.01 * index
        s.atoms.wrap(eps=0)
        s.labels["forces"][1] = [3.0, 0, 0]
        s.labels["energy"] += 3.0 * 0.01 * index
    found = scale_of_magforces(frames)
    assert found.factor == pytest.approx(1.4, rel=1e-6)


def test_a_scale_that_the_data_do_not_determine_is_refused():
    for frames in (spiral(2), spiral(8, step=1.0)):
        with pytest.raises(PathtuneError, match="cannot be fitted"):
            structures.fit_scale(frames)
    noise = spiral()
    for s, energy in zip(noise, (0, 3, 1, 7, 2, 5, 1, 4), strict=True):
        s.labels["energy"][...] = energy
    with pytest.raises(PathtuneError, match="a factor of"):
        structures.fit_scale(noise)


@pytest.mark.parametrize(
    ("factor", "unit"),
    [(1e-3, "meV/μ_B"), (-1.0, "opposite sign"), (27.2114, "Hartree/μ_B")],
)
def test_magnetic_forces_in_another_unit_are_an_error(factor, unit):
    report = structures.check(spiral(factor=factor))
    (found,) = (f for f in report.findings if f.code == "magforces-units")
    assert found.severity == "error" and unit in found.message


def test_checks_of_moments():
    def frame(moments, **labels):
        array = np.array(moments, dtype=float)
        atoms = ase.Atoms("Fe" * len(array), np.eye(3)[: len(array)] * 2.5)
        return Structure(atoms, {"magmoms": array, **labels})

    assert "formal-moments" in codes([frame([1, -1, 0.5])] * 5)
    assert "formal-moments" not in codes([frame([1.01, -1, 0.5])] * 5)
    assert "tiny-moments" in codes([frame([9.27e-24, 0, 0])])
    mixed = codes([frame([1.7, -1.6]), frame(np.eye(3)[:2] * 1.8)])
    assert "1 of 2 structures" in mixed["mixed-moments"]
    alone = frame([NAN, NAN], magforces=np.ones((2, 3)))
    del alone.labels["magmoms"]
    assert "magforces-without-moments" in codes([alone])
    assert not {c for c in codes([frame([1.7, -1.6])]) if "moments" in c}


def test_a_label_replaces_the_initial_moment_and_a_missing_one_does_not():
    atoms = ase.Atoms("Fe3")
    atoms.set_initial_magnetic_moments([5, 5, 5])
    labels = {"magmoms": np.array([2.2, -2.1, NAN]), "magforces": np.ones((3, 3))}
    bare = Structure(ase.Atoms("Fe3"), {})
    first, second = structures.magnetised([Structure(atoms, labels), bare], 1.5)
    moments = first.atoms.get_initial_magnetic_moments()
    assert moments.tolist() == [[0, 0, 2.2], [0, 0, -2.1], [0, 0, 5]]
    assert first.labels["magforces"].tolist() == [[1.5] * 3] * 3
    assert atoms.get_initial_magnetic_moments().tolist() == [5, 5, 5], "not modified"
    assert not second.atoms.get_initial_magnetic_moments().any()
    assert structures.unmagnetised([first, second]) == [1]
    assert structures.unmagnetised([second]) == []


def test_wrong_shape_of_magnetic_forces_is_named(tmp_path):
    atoms = ase.Atoms("Fe2", [[0, 0, 0], [0, 0, 2]])
    atoms.arrays["REF_magforces"] = np.ones(2)
    ase.io.write(tmp_path / "a.xyz", atoms)
    with pytest.raises(PathtuneError, match=r"magforces has shape \(2,\), expected"):
        structures.read(tmp_path / "a.xyz")


# Orderings


def orderings_of_two() -> list[Structure]:
    """Return three orderings of one cell, two of another, and a frame without spins."""
    frames = []
    for place, moments, energy in [
        (0.0, [2, 2], -10.0),
        (0.3, [2, 2], -20.0),
        (0.0, [2, -2], -10.2),
        (0.0, [0, 0], -9.0),
        (0.3, [2, -2], -20.4),
        (0.0, [2, 1], -10.1),
    ]:
        atoms = ase.Atoms("Fe2", [[0, 0, 0], [0, 0, 2 + place]])
        atoms.info["name"] = f"cell at {place}"
        labels = {"magmoms": np.array(moments, float), "energy": np.array(energy)}
        frames.append(Structure(atoms, labels))
    return frames


def test_orderings_are_frames_of_one_geometry_and_other_spins():
    frames = orderings_of_two()
    assert orderings.groups(frames) == [[0, 2, 5], [1, 4]]
    assert orderings.groups(frames, "name") == [[0, 2, 5], [1, 4]]
    assert orderings.groups(frames, "formula") == [[0, 1, 2, 4, 5]]
    assert orderings.groups([frames[0], frames[0]]) == [], "the same spins"
    with pytest.raises(UsageError, match="'nothing'"):
        orderings.groups(frames, "nothing")


def test_energy_differences_and_ranks():
    frames = orderings_of_two()
    energies = [-10.0, -20.0, -10.4, -9.0, -19.0, -10.2]
    result = orderings.compare(frames, energies)
    assert result is not None
    first, second = result["groups"]
    assert first["spearman"] == pytest.approx(1)
    assert second["spearman"] == pytest.approx(-1)
    assert result["spearman"] == pytest.approx((3 * 1 + 2 * -1) / 5)
    # meV/atom, predicted against labelled: 200 100 100 and 100 50 50; 500 and 200.
    assert first["labelled"] == pytest.approx([50, -50, 0])
    assert result["difference_mae_mev_per_atom"] == pytest.approx(
        (100 + 50 + 50 + 700) / 4
    )
    alike = orderings.compare(frames, [-1.0] * 6)
    assert alike is not None and alike["spearman"] is None
    assert orderings.compare([frames[3]], [0.0]) is None


# Files, counts, settings


def delta_file(**metadata) -> DeltaFile:
    change = Change(torch.tensor([1]), torch.tensor([0.5]).double(), (3,))
    layer = {"spin.head.weight": torch.ones(2, 2), "spin.head.bias": torch.zeros(2)}
    base = {"backend": "b", "model": "m", "base": {"w": "x"}, "spin": {"width": 2}}
    return DeltaFile({"w": change}, {}, {**base, **metadata}, layer)


def test_the_layer_is_in_the_delta_file(tmp_path):
    saved = delta_file()
    for name in ("a", "b"):
        saved.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = DeltaFile.load(tmp_path / "a")
    assert (loaded.updated_parameters, loaded.new_parameters) == (7, 6)
    for name, tensor in saved.layer.items():
        assert torch.equal(loaded.layer[name], tensor)
    merged = loaded.merged({"w": torch.zeros(3)})
    assert set(merged) == {"w", *saved.layer}
    delta_file(spin=None).save(tmp_path / "c")
    with pytest.raises(PathtuneError, match="stray tensors: spin"):
        DeltaFile.load(tmp_path / "c")
    saved.layer["spin.head.bias"][0] = NAN
    saved.save(tmp_path / "d")
    with pytest.raises(PathtuneError, match="infinite or NaN"):
        DeltaFile.load(tmp_path / "d")


def test_the_layer_stays_in_a_sum_and_is_never_scaled():
    first = delta_file()
    plain = DeltaFile(first.changes, {}, first.metadata)
    assert first.add(plain).layer.keys() == first.layer.keys()
    for refused in (lambda: first.scale(0.5), lambda: plain.add(first)):
        with pytest.raises(UsageError, match=r"not linear|cannot be scaled"):
            refused()


def test_new_parameters_count_as_updated_and_not_as_active():
    counts = sparsity(30, 40, 110, 10)
    assert counts["total_sparsity"] == pytest.approx(1 - 30 / 110)
    assert counts["active_sparsity"] == pytest.approx(1 - 20 / 40)
    assert counts["new_parameters"] == 10
    assert "new_parameters" not in sparsity(30, 40, 100)


def test_the_layer_has_an_optimizer_group_of_its_own():
    from pathtune.methods import frozen

    change = frozen.Change(
        frozen.Config(),
        [],
        total_parameters=1,
        dtype=torch.float32,
        generator=torch.Generator(),
    )
    options = {"lr": 0.3, "weight_decay": 0.1}
    layer = {"spin.a": torch.ones(2, 3)}
    delta = Delta({"w": torch.ones(1)}, [], change, layer, options)
    (group,) = delta.param_groups()
    assert group["lr"] == 0.3 and group["weight_decay"] == 0.1
    assert delta.trainable == delta.new == 6
    assert delta()["spin.a"] is group["params"][0]
    other = Delta({"w": torch.ones(1)}, [], change, {"spin.a": torch.zeros(2, 3)})
    other.load_state_dict(delta.state_dict())
    assert torch.equal(other.stored_layer()["spin.a"], layer["spin.a"])


def test_settings_of_the_layer():
    def config(**settings):
        return validate(RunConfig, {"model": "m", "train": "t", **settings}, "setting")

    assert config().loss_weights["forces"] == 10
    weights = config(spin={}).loss_weights
    assert set(weights.values()) == {1.0}
    assert config(spin={}, forces_weight=5).loss_weights["forces"] == 5
    with pytest.raises(UsageError, match=r"Did you mean 'spin.width'"):
        config(spin={"widht": 8})
    with pytest.raises(UsageError, match="magforces_scale"):
        config(magforces_scale=-1)
    assert config(magforces_scale="fit").magforces_scale == "fit"
