"""NequIP: the vendor's layers and files, its tools on merged ones, its global state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import ase
import ase.build
import numpy as np
import pytest
import torch

import pathtune
from pathtune import delta as deltas
from pathtune import discovery, files
from pathtune.backends.base import undisturbed
from pathtune.backends.nequip import Backend
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.methods import sparse
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.testing import check_backend, check_method, symmetry_errors
from tests.backends.families import FAMILIES

pytestmark = pytest.mark.nequip

MAKE = Path(__file__).with_name("tiny_nequip.py")
# File -> precision in which its vendor computes.
VARIANTS = {
    "tiny.nequip.zip": "float32",
    "tiny.ckpt": "float32",
    "trainable.nequip.zip": "float32",
    "single.nequip.zip": "float64",
    "single.ckpt": "float64",
}


def run(*command, cwd) -> subprocess.CompletedProcess:
    """Run a program of this environment in one thread; return what it prints."""
    program = Path(sys.executable).with_name(command[0])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(program), *map(str, command[1:])]
    finished = subprocess.run(
        arguments, cwd=cwd, env=env, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of tiny_nequip.py."""
    path = tmp_path_factory.mktemp("nequip")
    run("python", MAKE, path, cwd=path)
    return path


@pytest.fixture(scope="module")
def load(folder):
    """Load a file, each precision once."""
    loaded = {}

    def load(name, dtype=None) -> Backend:
        dtype = dtype or VARIANTS[name]
        if (name, dtype) not in loaded:
            loaded[name, dtype] = pathtune.load(
                str(folder / name), dtype=dtype, device="cpu", trust_checkpoint=True
            )
        return loaded[name, dtype]

    return load


@pytest.fixture(scope="module")
def merged_path(load, tmp_path_factory):
    """tiny.nequip.zip with a random delta, merged."""
    path = tmp_path_factory.mktemp("merged") / "merged.nequip.zip"
    base = load("tiny.nequip.zip")
    report = pathtune.merge(base, random_delta(base), path)
    assert report["reference_energy_rounding_ev_per_atom"] < 1e-12
    return path


def samples() -> list[Structure]:
    methanol = ase.build.molecule("CH3OH")
    methanol.rattle(0.05, seed=1)
    oxide = ase.build.bulk("CuO", "rocksalt", a=4.2)
    oxide.rattle(0.05, seed=2)
    copper = ase.build.bulk("Cu", cubic=True)
    copper.rattle(0.05, seed=3)
    return [Structure(a) for a in (methanol, oxide, copper, ase.Atoms("H"))]


def random_delta(backend, *, elements=("H", "C", "O"), std=0.05) -> DeltaFile:
    """Return a delta of random changes, as a training would leave it."""
    module = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=sparse,
        config=sparse.Config(init_std=std, initial_threshold=std / 2),
        selection="all",
        elements=elements,
        head=None,
        seed=1,
    )
    stored = backend.stored_weights()
    shifts = {"H": -3.25, "C": 0.125, "O": -432.1}
    metadata = {"model": backend.model_name, "base": fingerprint(stored), "head": None}
    return DeltaFile(module.changes(stored), shifts, metadata)


def tuned(backend, delta) -> list:
    weights = delta.apply(backend.stored_weights())
    return predict(
        backend, samples(), weights=weights, shifts=delta.shifts, batch_size=1
    )


def assert_equal(ours, theirs, tolerance=0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance)


# Models


@pytest.mark.parametrize("name", VARIANTS)
def test_contract(load, name):
    check_backend(load(name), samples())
    check_backend(load(name, "float64"), samples())


@pytest.mark.parametrize("name", ["tiny.nequip.zip", "trainable.nequip.zip"])
@pytest.mark.parametrize("method", discovery.names("methods"))
def test_methods(load, name, method):
    check_method(load(name, "float64"), method, samples()[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_prediction_is_the_vendors_calculator(load, folder, name):
    vendor = FAMILIES["nequip"].calculator(str(folder / name))
    predicted = predict(load(name), samples(), batch_size=1)
    for structure, ours in zip(samples(), predicted, strict=True):
        atoms = structure.atoms.copy()
        atoms.calc = vendor
        assert atoms.get_potential_energy() == pytest.approx(ours["energy"], abs=1e-9)
        assert np.abs(atoms.get_forces() - ours["forces"]).max() < 1e-9
        if atoms.cell.rank == 3:
            assert np.abs(atoms.get_stress() - ours["stress"]).max() < 1e-9


def test_a_checkpoint_is_the_average_of_its_training_as_the_package_is(load):
    package, checkpoint = load("tiny.nequip.zip"), load("tiny.ckpt")
    assert_equal(predict(package, samples()), predict(checkpoint, samples()))
    state = torch.load(checkpoint._path, weights_only=False)["state_dict"]
    last = state["model.sole_model.model.func.type_embed.embed_module.weight"]
    name = "model.func.type_embed.embed_module.weight"
    assert not torch.equal(last, checkpoint.stored_weights()[name])


def test_records_of_a_known_architecture(load):
    backend = load("trainable.nequip.zip")
    records = {w.name.removeprefix("model.func."): w for w in backend.path_weights()}
    sizes: dict[str, int] = {}
    for weight in records.values():
        sizes[weight.kind] = sizes.get(weight.kind, 0) + weight.size
    assert sizes == {"linear": 760, "fctp": 1664, "radial": 1280, "scale_shift": 8}
    embedding = records["type_embed.embed_module.weight"]
    assert (embedding.role, embedding.elements) == ("embedding", ("H", "C", "O", "Cu"))
    assert embedding.paths[0].element_axis == 0
    # Scalars and their gates, 1o; the type embedding of 8 features in the middle.
    connection = records["layer1_convnet.conv.sc.weight"]
    assert (connection.role, connection.layer) == ("interaction", 1)
    found = [(p.shape, p.irrep_in, p.irrep_out) for p in connection.paths]
    assert found == [((8, 8, 16), "0e", "0e"), ((4, 8, 4), "1o", "1o")]
    assert records["layer1_convnet.conv.edge_mlp.mlp.2.weight"].kind == "radial"
    readout = records["per_atom_energy_readout.mlp_module.mlp.0.weight"]
    assert (readout.kind, readout.role, readout.layer) == ("linear", "readout", None)
    shifts = records["per_type_energy_scale_shift.shifts"]
    assert (shifts.kind, shifts.properties) == ("scale_shift", ("energy",))
    assert int(shifts.alive({"H", "O"}, None).sum()) == 2


@pytest.mark.parametrize("name", ["tiny.nequip.zip", "trainable.nequip.zip"])
def test_entries_called_dead_are_exactly_those_without_gradient(load, name):
    """Absent elements, and pseudovectors no later layer reads."""
    backend = load(name, "float64")
    positions = np.random.default_rng(0).normal(size=(6, 3)) * 1.5
    atoms = ase.Atoms("OHCH2O", positions)
    weights = {
        name: p.detach().clone().requires_grad_()
        for name, p in backend.model.named_parameters()
    }
    batch = backend.batch([backend.graph(atoms)])
    out = backend.predict(batch, weights, ["energy", "forces"], training=True)
    loss = out["energy"].sum() + (out["forces"] ** 2).sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    dead = 0
    for weight, gradient in zip(backend.path_weights(), gradients, strict=True):
        alive = weight.alive({"H", "C", "O"}, None)
        np.testing.assert_array_equal(alive, gradient.flatten().numpy() != 0)
        dead += int((~alive).sum())
    # A row of 8 features; 1e of layer 1: its 4x4 weights in two layers, the 4 gates in
    # linear_2 (12 inputs) and sc (8 x 8), 4 of 28 paths of the radial network (16).
    by_type = {"tiny.nequip.zip": 0, "trainable.nequip.zip": 2}[name]
    assert dead == 8 + 2 * 16 + 4 * (12 + 64 + 16) + by_type


@pytest.mark.parametrize(
    "name", ["layer1_convnet.conv.linear_2", "layer1_convnet.conv.sc"]
)
def test_an_entry_of_a_path_couples_the_channels_its_place_says(load, name):
    """Moved by one, it adds one input channel to one output channel and no more."""
    backend = load("tiny.nequip.zip", "float64")
    module = backend.model.get_submodule(f"model.func.{name}")
    (record,) = (w for w in backend.path_weights() if name in w.name)
    generator = torch.Generator().manual_seed(0)

    def normal(irreps):
        return torch.randn(5, irreps.dim, generator=generator, dtype=torch.float64)

    is_linear = hasattr(module, "irreps_in")
    irreps_in = module.irreps_in if is_linear else module.irreps_in1
    x = normal(irreps_in)
    others = () if is_linear else (normal(module.irreps_in2),)

    def channels(features, irreps, irrep) -> torch.Tensor:
        """Return the features of one irrep, shape (5, multiplicity, 2 l + 1)."""
        blocks = zip(irreps, irreps.slices(), strict=True)
        (found,) = (
            features[:, part].reshape(5, mul, -1)
            for (mul, ir), part in blocks
            if str(ir) == irrep
        )
        return found

    draw = np.random.default_rng(0)
    for path in record.paths:
        place = tuple(draw.integers(0, n) for n in path.shape)
        weight = module.weight.detach().clone()
        weight[path.start : path.stop].view(path.shape)[place] += 1
        with torch.no_grad():
            changed = torch.func.functional_call(
                module, {"weight": weight}, (x, *others)
            ) - module(x, *others)
        moved = channels(changed, module.irreps_out, path.irrep_out)
        source = channels(x, irreps_in, path.irrep_in)[:, place[0]]
        if others:
            source = source * others[0][:, place[1], None]
        factor = (moved[:, place[-1]] / source).flatten()
        assert factor.abs().min() > 0
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
        n_moved = (changed.abs() > 1e-12).any(0).sum()
        assert n_moved == source.shape[-1]


def test_coupling_constants_are_rebuilt_in_float64(load):
    from e3nn import o3

    name = "model.func.layer1_convnet.conv.tp_scatter.tp._compiled_main_left_right"
    double = load("tiny.nequip.zip", "float64")
    constants = double.model.get_submodule(name)._w3j_1_1_1
    assert torch.equal(constants, o3.wigner_3j(1, 1, 1, dtype=torch.float64))
    assert not torch.equal(constants, constants.float().double())
    for structure in samples():
        errors = symmetry_errors(double, structure, {})
        assert "inversion" in errors
        for energy, forces in errors.values():
            assert max(energy, forces) < 1e-12
    single = predict(load("tiny.nequip.zip"), samples())
    assert_equal(predict(double, samples()), single, tolerance=1e-5)


def test_forces_and_stress_are_derivatives(load):
    backend = load("tiny.nequip.zip", "float64")
    atoms = samples()[1].atoms
    analytic = predict(backend, [Structure(atoms)])[0]

    def slope(change, step=1e-4):
        energies = []
        for sign in (1, -1):
            changed = atoms.copy()
            change(changed, sign * step)
            energies.append(predict(backend, [Structure(changed)])[0]["energy"])
        return (energies[0] - energies[1]) / (2 * step)

    def move(changed, step):
        changed.positions[1, 2] += step

    assert -slope(move) == pytest.approx(analytic["forces"][1, 2], abs=1e-8)
    pairs = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    for voigt, (i, j) in enumerate(pairs):

        def strain(changed, step, i=i, j=j):
            matrix = np.eye(3)
            matrix[i, j] += step / 2
            matrix[j, i] += step / 2
            changed.set_cell(changed.cell @ matrix, scale_atoms=True)

        numeric = slope(strain) / atoms.get_volume()
        assert numeric == pytest.approx(analytic["stress"][voigt], abs=1e-9)


def test_training_on_a_batch_with_and_without_a_cell(load):
    """The stress of a molecule is NaN; it reaches no gradient."""
    backend = load("tiny.nequip.zip")
    weights = {
        name: p.detach().clone().requires_grad_()
        for name, p in backend.model.named_parameters()
    }
    batch = backend.batch([backend.graph(s.atoms) for s in samples()])
    out = backend.predict(batch, weights, backend.properties, training=True)
    assert torch.isfinite(out["stress"]).all(1).tolist() == [False, True, True, False]
    loss = (out["stress"][1:3] ** 2).sum() + (out["forces"] ** 2).sum()
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize(
    "name", ["tiny.nequip.zip", "trainable.nequip.zip", "tiny.ckpt"]
)
def test_rewritten_layers_train_alike(load, name):
    """Predictions and gradients, also of an atom without neighbours."""
    backend = load(name, "float64")
    model = backend.rewritten()
    scatter = "model.func.layer1_convnet.conv.tp_scatter"
    assert type(model.get_submodule(scatter)) is not type(
        backend.model.get_submodule(scatter)
    )
    batch = backend.batch([backend.graph(s.atoms) for s in samples()])
    results = []
    try:
        for backend.training_model in (None, model):
            weights = {
                name: p.detach().clone().requires_grad_()
                for name, p in backend.model.named_parameters()
            }
            out = backend.predict(batch, weights, backend.properties, training=True)
            loss = out["energy"].sum() + (out["forces"] ** 2).sum()
            loss = loss + (out["stress"][1:3] ** 2).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()))
            results.append((out["energy"], out["forces"], out["stress"], *gradients))
    finally:
        backend.training_model = None
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-11, equal_nan=True)


# Merged files


def test_the_vendors_command_line_compiles_a_merged_package(load, tmp_path):
    """`nequip-compile`, then the calculator of what it wrote."""
    base = load("single.nequip.zip")
    merged_path = tmp_path / "merged.nequip.zip"
    pathtune.merge(base, random_delta(base), merged_path)
    compiled = tmp_path / "merged.nequip.pt2"
    run(
        *("nequip-compile", merged_path, compiled, "--mode", "aotinductor"),
        *("--device", "cpu", "--target", "ase"),
        *("--inductor-configs", "aot_inductor.compile_wrapper_opt_level=O0"),
        cwd=tmp_path,
    )
    ase.io.write(tmp_path / "frames.traj", [s.atoms for s in samples()[:3]])
    script = """if True:
        import ase.io
        from nequip.integrations.ase import NequIPCalculator
        frames = ase.io.read("frames.traj", ":")
        for atoms in frames:
            atoms.calc = NequIPCalculator.from_compiled_model(
                "merged.nequip.pt2", "cpu", chemical_species_to_atom_type_map=True
            )
            atoms.get_forces()
        ase.io.write("predicted.traj", frames)
    """
    run("python", "-c", script, cwd=tmp_path)
    predicted = ase.io.read(tmp_path / "predicted.traj", ":")
    expected = tuned(base, random_delta(base))[:3]
    for atoms, ours in zip(predicted, expected, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(ours["energy"], abs=1e-9)
        assert np.abs(atoms.get_forces() - ours["forces"]).max() < 1e-9


def test_all_of_the_package_but_its_weights_is_the_bases(folder, merged_path):
    """Code, settings and compile modes; not the stand-ins for what nobody calls."""

    def texts(path):
        with zipfile.ZipFile(path) as opened:
            return {
                name.partition("/")[2]: opened.read(name)
                for name in opened.namelist()
                if name.endswith((".py", ".yaml", ".txt")) and "matplotlib" not in name
            }

    base, merged = texts(folder / "tiny.nequip.zip"), texts(merged_path)
    assert "model/package_metadata.txt" in base
    assert "nequip/nn/interaction_block.py" in base
    assert base == merged


def test_all_compile_modes_of_a_merged_package_have_the_weights(load, merged_path):
    from nequip.model import ModelFromPackage

    base = load("tiny.nequip.zip")
    merged = {
        **base.stored_weights(),
        **random_delta(base).merged(base.stored_weights()),
    }
    for mode in ("eager", "compile"):
        with undisturbed(torch.float64), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ModelFromPackage(str(merged_path), mode)["sole_model"]
        found = dict(model.named_parameters())
        assert found.keys() == merged.keys()
        assert all(torch.equal(found[name], merged[name]) for name in merged)


def test_a_merged_package_can_be_tuned_and_merged_again(load, merged_path, tmp_path):
    again = pathtune.load(str(merged_path), device="cpu", trust_checkpoint=True)
    base = load("tiny.nequip.zip")
    assert again.reference_energies()["O"] == pytest.approx(-3.3 - 432.1, abs=1e-12)
    ours = tuned(base, random_delta(base))
    assert_equal(ours, predict(again, samples(), batch_size=1), tolerance=1e-10)
    delta = random_delta(again, elements=("Cu",))
    path = tmp_path / "twice.nequip.zip"
    pathtune.merge(again, delta, path)
    twice = pathtune.load(str(path), device="cpu", trust_checkpoint=True)
    ours = tuned(again, delta)
    assert_equal(ours, predict(twice, samples(), batch_size=1), tolerance=1e-10)


def test_a_merged_checkpoint_is_packaged_by_the_vendor(load, folder, tmp_path):
    """Average and last weights are the merged ones; no optimizer state is left."""
    base = load("tiny.ckpt")
    delta = random_delta(base)
    pathtune.merge(base, delta, tmp_path / "merged.ckpt")
    content = torch.load(tmp_path / "merged.ckpt", weights_only=False)
    assert "optimizer_states" not in content
    state = content["state_dict"]
    n = len(base.stored_weights())
    for index, (name, parameter) in enumerate(base.model.named_parameters()):
        last = state[f"model.sole_model.{name}"]
        assert torch.equal(last, state[f"ema.ema_weight_{index}"])
        if name in delta.changes:
            assert not torch.equal(last, parameter)
    assert index == n - 1
    shutil.copy(folder / "frame.xyz", tmp_path)  # the vendor takes its example there
    package = tmp_path / "packaged.nequip.zip"
    run("nequip-package", "build", "merged.ckpt", package, cwd=tmp_path)
    packaged = pathtune.load(str(package), device="cpu", trust_checkpoint=True)
    ours = predict(packaged, samples(), batch_size=1)
    assert_equal(ours, tuned(base, delta), tolerance=1e-10)


def test_a_package_without_shifts_by_type_gets_them(load, tmp_path):
    base = load("single.nequip.zip")
    assert base.reference_energies() == dict.fromkeys(base.elements, -2.5)
    delta = random_delta(base)
    pathtune.merge(base, delta, tmp_path / "merged.nequip.zip", dtype="float64")
    merged = pathtune.load(
        str(tmp_path / "merged.nequip.zip"), dtype="float64", trust_checkpoint=True
    )
    expected = {"H": -5.75, "C": -2.375, "O": -434.6, "Cu": -2.5}
    assert merged.reference_energies() == pytest.approx(expected, abs=1e-12)
    assert_equal(predict(merged, samples()), tuned(base, delta), tolerance=1e-10)


def test_a_checkpoint_without_shifts_by_type_is_refused(load, tmp_path):
    base = load("single.ckpt")
    assert not base.has_shift_by_element
    with pytest.raises(PathtuneError, match="make a package of it first"):
        pathtune.merge(base, random_delta(base), tmp_path / "merged.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_reference_energies_that_are_parameters_keep_float64(load, tmp_path):
    base = load("trainable.nequip.zip")
    name = "model.func.per_type_energy_scale_shift.shifts"
    assert base.stored_weights()[name].dtype == torch.float64
    delta = random_delta(base)
    pathtune.merge(base, delta, tmp_path / "merged.nequip.zip")
    merged = pathtune.load(
        str(tmp_path / "merged.nequip.zip"), device="cpu", trust_checkpoint=True
    )
    after = merged.reference_energies()
    expected = {"H": -4.35, "C": -2.075, "O": -435.4, "Cu": -4.4}
    assert after == pytest.approx(expected, abs=1e-12)
    assert after["Cu"] == base.reference_energies()["Cu"]
    module = deltas.build(
        base.path_weights(),
        dict(base.model.named_parameters()),
        method=sparse,
        config=sparse.Config(),
        selection=r"name=shifts",
        elements=["H"],
        head=None,
        seed=0,
    )
    assert module()[name].dtype == torch.float64
    assert set(module.changes(base.stored_weights())) == {name}


def test_merging_into_the_other_kind_of_file_is_refused(load, tmp_path):
    for name, target in (
        ("tiny.nequip.zip", "merged.ckpt"),
        ("tiny.ckpt", "merged.nequip.zip"),
    ):
        base = load(name)
        with pytest.raises(UsageError, match="file of its own kind"):
            pathtune.merge(base, random_delta(base), tmp_path / target)


def test_a_base_that_changed_is_not_merged(folder, tmp_path):
    path = tmp_path / "tiny.nequip.zip"
    shutil.copy(folder / path.name, path)
    base = pathtune.load(str(path), device="cpu", trust_checkpoint=True)
    delta = random_delta(base)
    shutil.copy(folder / "single.nequip.zip", path)
    with pytest.raises(PathtuneError, match="has changed since it was loaded"):
        pathtune.merge(base, delta, tmp_path / "merged.nequip.zip")


# Names and errors


def test_names_and_what_they_mean(monkeypatch, tmp_path):
    monkeypatch.setenv("NEQUIP_CACHE_DIR", str(tmp_path))
    infos = {i.name: i for i in pathtune.models() if i.backend == "nequip"}
    large = infos["NequIP-OAM-L"]
    assert "nequip.net:mir-group/NequIP-OAM-L:0.1" in large.checkpoint
    assert not large.available
    assert large.reason == "downloaded by the vendor when used"
    assert Backend.knows("nequip-oam-l")
    assert Backend.knows("nequip.net:someone/other:1.0")
    assert not Backend.knows("other.nequip.zip")


def test_a_failed_download_says_where_the_file_is_expected(monkeypatch, tmp_path):
    def offline(self, url):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("requests.Session.get", offline)
    monkeypatch.setenv("NEQUIP_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(PathtuneError) as caught:
        pathtune.load("NequIP-OAM-L", trust_checkpoint=True)
    message = str(caught.value)
    assert "no route to host" in message
    assert "https://www.nequip.net/models/mir-group/NequIP-OAM-L:0.1" in message
    assert str(tmp_path / "cache") in message
    with pytest.raises(UsageError, match="no identifier"):
        pathtune.load("nequip.net:NequIP-OAM-L")


def test_the_vendors_cache_is_used_without_a_network(monkeypatch, tmp_path, folder):
    """The record is the one the vendor writes beside a download."""
    monkeypatch.setenv("NEQUIP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.Session.get", None)
    (tmp_path / "aaa.metadata.json").write_text("{", encoding="utf-8")
    shutil.copy(folder / "tiny.nequip.zip", tmp_path / "abc.nequip.zip")
    record = {"model_id": "mir-group/NequIP-OAM-L:0.1"}
    (tmp_path / "abc.metadata.json").write_text(json.dumps(record), encoding="utf-8")
    infos = {i.name: i for i in pathtune.models() if i.backend == "nequip"}
    assert infos["NequIP-OAM-L"].available
    assert not infos["NequIP-OAM-M"].available
    with pytest.raises(PathtuneError, match="--trust-checkpoint"):
        pathtune.load("NequIP-OAM-L")
    loaded = pathtune.load("NequIP-OAM-L", device="cpu", trust_checkpoint=True)
    assert loaded.model_name == "NequIP-OAM-L"
    assert loaded.elements == ("H", "C", "O", "Cu")


def test_files_that_are_no_models(tmp_path, folder):
    whole = (folder / "tiny.nequip.zip").read_bytes()
    broken = {
        "text.nequip.zip": b"not a zip",
        "cut.nequip.zip": whole[: len(whole) // 2],
        "text.ckpt": b"no checkpoint",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name in (*broken, "other.ckpt"):
        with pytest.raises(PathtuneError, match="cannot be read as a NequIP"):
            pathtune.load(str(tmp_path / name), trust_checkpoint=True)


def test_what_a_model_cannot_do_is_refused(folder):
    with pytest.raises(UsageError, match="no heads"):
        pathtune.load(
            str(folder / "tiny.nequip.zip"), head="PBE", trust_checkpoint=True
        )
    with pytest.raises(UsageError, match="add --dtype float64"):
        pathtune.load(str(folder / "single.nequip.zip"), trust_checkpoint=True)


def test_the_vendors_global_state_is_found_as_it_was(folder, tmp_path):
    """Also e3nn's default, which the vendor's building of a model turns over."""
    import e3nn
    import torch._dynamo
    from nequip.utils import global_state

    def state():
        fusion = torch._C._jit_set_fusion_strategy([("STATIC", 1)])
        torch._C._jit_set_fusion_strategy(fusion)
        return (
            torch.get_default_dtype(),
            e3nn.get_optimization_defaults(),
            dict(global_state._latest_global_config),
            global_state._GLOBAL_STATE_INITIALIZED,
            torch._dynamo.config.capture_scalar_outputs,
            torch.multiprocessing.get_sharing_strategy(),
            torch.backends.fp32_precision,
            fusion,
            dict(os.environ),
        )

    before = state()
    for name, target in (
        ("tiny.nequip.zip", "merged.nequip.zip"),
        ("tiny.ckpt", "merged.ckpt"),
    ):
        base = pathtune.load(str(folder / name), device="cpu", trust_checkpoint=True)
        delta = random_delta(base)
        pathtune.merge(base, delta, tmp_path / target)
        pathtune.calculator(base, delta)
        assert state() == before
    (tmp_path / "bad.ckpt").write_bytes(files.sha256(folder / "tiny.ckpt").encode())
    with pytest.raises(PathtuneError):
        pathtune.load(str(tmp_path / "bad.ckpt"), trust_checkpoint=True)
    assert state() == before
