"""SevenNet: parity with the vendor's tools, path records, merging, symmetry."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from rich.console import Console

from pathtune import api
from pathtune import delta as deltas
from pathtune.backends.base import undisturbed
from pathtune.config import RunConfig
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.methods import sparse
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.testing import check_backend, symmetry_errors
from tests.conftest import crystals

pytestmark = pytest.mark.sevennet

NAMES = [("7net-0", None), ("7net-l3i5", None), ("7net-mf-0", "PBE")]


def model(name, head=None, dtype="float32"):
    """Load a released model once for the whole module."""
    key = (name, head, dtype)
    if key not in _loaded:
        _loaded[key] = api.load(name, head=head, dtype=dtype, device="cpu")
    return _loaded[key]


_loaded: dict = {}


@pytest.fixture(scope="module")
def base():
    return model("7net-0")


@pytest.fixture(scope="module")
def double():
    return model("7net-0", dtype="float64")


@pytest.fixture(scope="module")
def merged_path(base, tmp_path_factory):
    """7net-0 with a random delta, merged."""
    path = tmp_path_factory.mktemp("merged") / "merged.pth"
    report = api.merge(base, random_delta(base), path)
    assert report["forces_max_difference_ev_per_angstrom"] <= 1e-5
    return path


def samples() -> list[Structure]:
    water = ase.build.molecule("H2O")
    water.rattle(0.05, seed=1)
    oxide = ase.build.bulk("NiO", "rocksalt", a=4.2)
    oxide.rattle(0.05, seed=2)
    copper = ase.build.bulk("Cu", cubic=True)
    copper.rattle(0.05, seed=3)
    single = ase.build.bulk("Fe")
    return [Structure(a) for a in (water, oxide, copper, single)]


def random_delta(backend, *, elements=("H", "O", "Cu", "Ni"), std=0.05) -> DeltaFile:
    """Return a delta of random changes, as a training would leave it."""
    module = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=sparse,
        config=sparse.Config(init_std=std, initial_threshold=std / 2),
        selection="all",
        elements=elements,
        head=backend.head,
        seed=1,
    )
    stored = backend.stored_weights()
    shifts = {"H": -3.25, "O": -432.1, "Cu": 0.125, "Ni": 11.7}
    metadata = {"model": backend.model_name, "base": fingerprint(stored)}
    return DeltaFile(module.changes(stored), shifts, {**metadata, "head": backend.head})


@pytest.mark.parametrize(("name", "head"), NAMES)
def test_contract(name, head):
    check_backend(model(name, head), samples())


def test_contract_of_a_model_with_fctp_and_inversion(trusted_tiny):
    copper = [s for s in samples() if set(s.atoms.symbols) == {"Cu"}]
    backend = api.load(trusted_tiny, device="cpu")
    check_backend(backend, copper)
    kinds = {w.kind for w in backend.path_weights()}
    assert {"linear", "fctp", "radial", "scale_shift"} <= kinds
    assert backend.has_inversion


@pytest.mark.parametrize(("name", "head"), NAMES)
def test_prediction_is_the_vendors_calculator(name, head):
    from sevenn.calculator import SevenNetCalculator

    backend = model(name, head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vendor = SevenNetCalculator(name, device="cpu", modal=head)
    for structure, ours in zip(samples(), predict(backend, samples()), strict=True):
        atoms = structure.atoms.copy()
        atoms.calc = vendor
        energy = atoms.get_potential_energy()
        assert abs(ours["energy"] - energy) / len(atoms) < 1e-5
        assert np.abs(ours["forces"] - atoms.get_forces()).max() < 1e-5
        if structure.atoms.cell.rank == 3:
            assert np.abs(ours["stress"] - atoms.get_stress()).max() < 1e-6


def test_total_parameters_and_kinds_of_sevennet_0(base):
    assert base.total_parameters == 842_623
    sizes: dict[str, int] = {}
    for weight in base.path_weights():
        sizes[weight.kind] = sizes.get(weight.kind, 0) + weight.size
    assert sizes["linear"] == 596_160
    assert sum(sizes.values()) == 842_623


@pytest.mark.parametrize(
    ("name", "head", "label"),
    [("7net-0", None, "OH"), ("7net-mf-0", "R2SCAN", "CuO")],
)
def test_entries_called_dead_are_exactly_those_without_gradient(name, head, label):
    """A generic loss on energy and forces reaches every alive entry and no other."""
    backend = model(name, head)
    atoms = ase.Atoms(
        label + "H2O", positions=np.random.default_rng(0).normal(size=(5, 3)) * 1.5
    )
    weights = {
        n: p.detach().clone().requires_grad_()
        for n, p in backend.model.named_parameters()
    }
    batch = backend.batch([backend.graph(atoms)])
    out = backend.predict(batch, weights, ["energy", "forces"], training=True)
    loss = out["energy"].sum() + (out["forces"] ** 2).sum()
    names = [w.name for w in backend.path_weights() if w.kind in ("linear", "fctp")]
    gradients = torch.autograd.grad(loss, [weights[n] for n in names])
    records = {w.name: w for w in backend.path_weights()}
    present = set(atoms.symbols)
    for name, gradient in zip(names, gradients, strict=True):
        alive = records[name].alive(present, head)
        assert np.count_nonzero(gradient.flatten().numpy()[~alive]) == 0, name
        assert np.count_nonzero(gradient.flatten().numpy()[alive]) > 0.99 * alive.sum()


def test_a_delta_of_one_head_is_refused_for_another(tmp_path):
    """All heads share one base, so its fingerprint alone would let it pass."""
    delta = random_delta(model("7net-mf-0", "PBE"))
    with pytest.raises(UsageError, match="for head 'PBE'"):
        api.merge(model("7net-mf-0", "R2SCAN"), delta, tmp_path / "m.pth")
    with pytest.raises(UsageError, match="for head 'PBE'"):
        api.calculator(model("7net-mf-0", "R2SCAN"), delta)


def test_scale_and_shift_of_absent_elements_and_other_heads_are_not_alive():
    backend = model("7net-mf-0", "PBE")
    alive = {
        w.name.rpartition(".")[2]: int(w.alive({"H", "O"}, "PBE").sum())
        for w in backend.path_weights()
        if w.kind == "scale_shift"
    }
    assert alive == {"shift": 2, "scale": 2}


def test_weights_of_absent_elements_and_other_heads_stay_bit_identical():
    backend = model("7net-mf-0", "R2SCAN")
    delta = random_delta(backend, elements=("H", "O"))
    stored = backend.stored_weights()
    merged = {**stored, **delta.apply(stored)}
    changed = 0
    for weight in backend.path_weights():
        old, new = stored[weight.name].flatten(), merged[weight.name].flatten()
        alive = torch.from_numpy(weight.alive({"H", "O"}, "R2SCAN"))
        assert torch.equal(old[~alive].view(torch.int32), new[~alive].view(torch.int32))
        changed += int((old != new).sum())
    assert changed == delta.updated_parameters > 0
    other = model("7net-mf-0", "PBE")
    assert other.reference_energies() != backend.reference_energies()


def assert_same_as_vendor(calculators, backend, delta):
    """Compare calculators with base + delta, frame by frame."""
    expected = predict(
        backend,
        samples()[:3],
        weights=delta.apply(backend.stored_weights()),
        shifts=delta.shifts,
    )
    for structure, ours in zip(samples()[:3], expected, strict=True):
        for calculator in calculators:
            atoms = structure.atoms.copy()
            atoms.calc = calculator
            energy = atoms.get_potential_energy()
            allowed = 1e-5 * len(atoms) + 4 * abs(energy) * 2**-24
            assert abs(energy - ours["energy"]) < allowed
            assert np.abs(atoms.get_forces() - ours["forces"]).max() < 1e-5


def vendor_calculator(path, head=None):
    from sevenn.calculator import SevenNetCalculator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SevenNetCalculator(path, device="cpu", modal=head)


def test_merged_file_in_the_vendors_calculator(base, merged_path):
    delta = random_delta(base)
    direct = api.calculator(base, delta)
    assert_same_as_vendor([vendor_calculator(merged_path), direct], base, delta)


def test_merging_into_one_head_leaves_the_other(tmp_path):
    backend, path = model("7net-mf-0", "PBE"), tmp_path / "merged.pth"
    delta = random_delta(backend)
    api.merge(backend, delta, path)
    assert_same_as_vendor([vendor_calculator(path, "PBE")], backend, delta)
    untouched = api.load(str(path), head="R2SCAN", device="cpu", trust_checkpoint=True)
    original = model("7net-mf-0", "R2SCAN")
    assert untouched.reference_energies() == original.reference_energies()


def test_vendors_command_line_reads_the_merged_file(tmp_path, base, merged_path):
    """`sevenn inference -au` and `sevenn get_model`, frame by frame."""
    delta = random_delta(base)
    data = tmp_path / "frames.xyz"
    frames = [s.atoms for s in samples()[:3]]
    ase.io.write(data, frames)
    sevenn = Path(sys.executable).with_name("sevenn")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    subprocess.run(
        [sevenn, "inference", merged_path, data, "-au", "-o", out, "-d", "cpu"],
        check=True,
        env=env,
        cwd=tmp_path,
        capture_output=True,
    )
    table = np.genfromtxt(
        out / "per_graph.csv", delimiter=",", names=True, dtype=None, encoding="utf-8"
    )
    energies = np.atleast_1d(table["inferred_total_energy"])
    forces = np.genfromtxt(
        out / "per_atom.csv", delimiter=",", names=True, dtype=None, encoding="utf-8"
    )
    columns = [forces[f"inferred_force_{axis}"] for axis in "xyz"]
    ours = predict(
        base,
        samples()[:3],
        weights=delta.apply(base.stored_weights()),
        shifts=delta.shifts,
    )
    for energy, expected, atoms in zip(energies, ours, frames, strict=True):
        allowed = 1e-5 * len(atoms) + 4 * abs(energy) * 2**-24
        assert abs(energy - expected["energy"]) < allowed
    ours_forces = np.concatenate([p["forces"] for p in ours])
    assert np.abs(np.stack(columns, 1) - ours_forces).max() < 1e-5
    subprocess.run(
        [sevenn, "get_model", merged_path],
        check=True,
        env=env,
        cwd=tmp_path,
        capture_output=True,
    )
    deployed = tmp_path / "deployed_serial.pt"
    assert torch.jit.load(deployed) is not None


def test_apply_then_remove_restores_sevennet_0_bit_for_bit(base):
    delta = random_delta(base)
    stored = base.stored_weights()
    restored = delta.remove({**stored, **delta.apply(stored)})
    for name, tensor in stored.items():
        assert torch.equal(tensor.view(torch.int32), restored[name].view(torch.int32))


def test_a_delta_for_another_model_is_refused(base):
    other = model("7net-l3i5")
    with pytest.raises(PathtuneError, match=r"'7net-0'.*first in '[\w.]+'"):
        random_delta(base).apply(other.stored_weights())


def test_symmetry_of_base_tuned_and_merged_in_float64(merged_path, base, double):
    """1e-8 eV/atom and 1e-7 eV/Å; a component-wise change must break it."""
    delta = random_delta(base)
    merged = api.load(
        str(merged_path), device="cpu", dtype="float64", trust_checkpoint=True
    )
    tuned = delta.apply(base.stored_weights())
    for backend, weights in ((double, {}), (double, tuned), (merged, {})):
        for structure in samples()[:3]:
            found = symmetry_errors(backend, structure, weights)
            assert set(found) == {"rotation", "translation", "permutation"}
            for name, (energy, forces) in found.items():
                assert energy < 1e-8, name
                assert forces < 1e-7, name


def test_symmetry_control_must_fail(double):
    """A weight change that differs from component to component breaks rotation.

    A path weight is one number for all components m of an irrep. Here the output of a
    layer is scaled component by component, as a change of weights that ignored the
    paths would do.
    """
    module = double.model._modules["1_self_interaction_2"]

    def component_wise(_module, _args, data):
        n = data["x"].shape[1]
        data["x"] = data["x"] * (1 + 0.1 * torch.linspace(-1, 1, n).double())
        return data

    handle = module.register_forward_hook(component_wise)
    try:
        found = symmetry_errors(double, samples()[0], {})
    finally:
        handle.remove()
    energy, forces = found["rotation"]
    assert energy > 1e-6
    assert forces > 1e-5
    assert found["permutation"][0] < 1e-8, "and nothing but rotation"


def test_inversion_is_tested_where_the_model_has_it(trusted_tiny):
    backend = api.load(trusted_tiny, device="cpu", dtype="float64")
    atoms = ase.build.molecule("CH3OH")
    atoms.rattle(0.1, seed=0)
    found = symmetry_errors(backend, Structure(atoms), {})
    assert "inversion" in found
    for energy, forces in found.values():
        assert energy < 1e-8
        assert forces < 1e-7


def test_forces_and_stress_are_derivatives_in_float64(double):
    structure = samples()[1]
    atoms = structure.atoms

    def energy(changed):
        return predict(double, [Structure(changed)])[0]["energy"]

    analytic = predict(double, [structure])[0]
    step = 1e-4
    moved = [atoms.copy(), atoms.copy()]
    for sign, copy in zip((1, -1), moved, strict=True):
        copy.positions[1, 2] += sign * step
    numeric = -(energy(moved[0]) - energy(moved[1])) / (2 * step)
    assert numeric == pytest.approx(analytic["forces"][1, 2], abs=1e-6)
    strained = [atoms.copy(), atoms.copy()]
    for sign, copy in zip((1, -1), strained, strict=True):
        strain = np.eye(3)
        strain[0, 1] = strain[1, 0] = sign * step / 2  # Voigt component xy
        copy.set_cell(copy.cell @ strain, scale_atoms=True)
    numeric = (energy(strained[0]) - energy(strained[1])) / (2 * step)
    assert numeric / atoms.get_volume() == pytest.approx(
        analytic["stress"][5], abs=1e-7
    )


def test_heads_are_asked_for():
    with pytest.raises(UsageError, match=r"--head R2SCAN\|PBE"):
        api.load("7net-mf-0")
    with pytest.raises(UsageError, match="Did you mean 'PBE'"):
        api.load("7net-mf-0", head="pbee")
    with pytest.raises(UsageError, match="no heads"):
        api.load("7net-0", head="PBE")


def test_names_and_the_files_they_mean():
    infos = {i.name: i for i in api.models() if i.backend == "sevennet"}
    assert "11Jul2024" in infos["7net-0"].checkpoint
    assert "22May2024" in infos["7net-0_22may2024"].checkpoint
    assert infos["7net-0"].available
    later = api.load("SevenNet-0_11July2024").stored_weights()
    assert fingerprint(later) == fingerprint(model("7net-0").stored_weights())


def test_the_process_is_found_as_it_was(tmp_path, base):
    before = (
        torch.get_default_dtype(),
        torch.get_rng_state().clone(),
        np.random.get_state()[1].copy(),
        dict(os.environ),
        list(warnings.filters),
    )
    api.load("7net-0", dtype="float64")
    api.merge(base, random_delta(base), tmp_path / "m.pth")
    with pytest.raises(RuntimeError), undisturbed(torch.float64):
        os.environ["PATHTUNE_TEST"] = "1"
        torch.manual_seed(1)
        raise RuntimeError
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert dict(os.environ) == before[3]
    assert list(warnings.filters) == before[4]


def test_moments_are_noted_and_not_trained(trusted_tiny, tmp_path):
    frames = crystals(6)
    for atoms in frames:
        atoms.arrays["REF_magmoms"] = np.ones(len(atoms))
    ase.io.write(tmp_path / "train.xyz", frames)
    config = RunConfig(
        model=trusted_tiny,
        train=str(tmp_path / "train.xyz"),
        output=str(tmp_path / "run"),
        max_steps=1,
        device="cpu",
    )
    console = Console(file=io.StringIO(), width=200)
    results = api.finetune(config, console=console)
    assert "does not predict magmoms" in console.file.getvalue()
    assert "magmom_mae_mu_b" not in results["valid"]
