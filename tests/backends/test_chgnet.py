"""CHGNet: classification, moments, structures without a cell, the vendor's tools."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings

import ase.build
import ase.io
import numpy as np
import pytest
import torch

import pathtune
from pathtune import trust
from pathtune.cli import main
from pathtune.config import RunConfig
from pathtune.deltafile import DeltaFile, exact_change, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.testing import check_backend

pytestmark = pytest.mark.chgnet

NAMES = ["chgnet-0.3.0", "chgnet-0.2.0", "chgnet-r2scan"]
_loaded: dict = {}


def model(name="chgnet-0.3.0", dtype="float32"):
    """Load a released model once for the whole module."""
    if (name, dtype) not in _loaded:
        _loaded[name, dtype] = pathtune.load(name, dtype=dtype, device="cpu")
    return _loaded[name, dtype]


@contextlib.contextmanager
def vendor_code():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def vendor_calculator(path=None, name="0.3.0"):
    with vendor_code():
        from chgnet.model import CHGNet, CHGNetCalculator

        if path is not None:
            return CHGNetCalculator.from_file(path, use_device="cpu")
        released = CHGNet.load(model_name=name, use_device="cpu")
        return CHGNetCalculator(released, use_device="cpu")


def nickel_oxide(seed=0, strain=0.0):
    """Return the antiferromagnetic cell Ni2O2, rattled."""
    atoms = ase.build.make_supercell(
        ase.build.bulk("NiO", "rocksalt", a=4.2), [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    )
    atoms.set_cell(atoms.cell * (1 + strain), scale_atoms=True)
    atoms.rattle(0.06, seed=seed)
    return atoms


def samples() -> dict[str, ase.Atoms]:
    """Return structures with a cell; two have no angle, one no bond."""
    ethanol = ase.build.molecule("CH3CH2OH", cell=[15, 16, 17], pbc=True)
    slab = ase.build.fcc111("Cu", (1, 1, 3), vacuum=6)
    hydrogen = ase.build.molecule("H2", cell=[14, 14, 14], pbc=True)
    frames = {"oxide": nickel_oxide(), "ethanol": ethanol, "slab": slab, "H2": hydrogen}
    for seed, atoms in enumerate(frames.values()):
        atoms.rattle(0.05, seed=seed)
    return frames | {"lone atom": ase.Atoms("O", cell=[14, 14, 14], pbc=True)}


def structures(frames=None) -> list[Structure]:
    return [Structure(atoms) for atoms in (frames or samples().values())]


def assert_same(calculator, ours, frames) -> None:
    for atoms, found in zip(frames, ours, strict=True):
        atoms = atoms.copy()
        atoms.calc = calculator
        with vendor_code():
            energy = atoms.get_potential_energy()
        n = len(atoms)
        rounding = 4 * abs(energy) * 2**-24
        assert abs(found["energy"] - energy) < 1e-6 * n + rounding
        # The vendor's own forces are off by up to 5e-5 where angles are close to 180°.
        assert np.abs(found["forces"] - atoms.get_forces()).max() < 2e-5
        assert np.abs(found["magmoms"] - atoms.get_magnetic_moments()).max() < 1e-6
        if "stress" in found:
            assert np.abs(found["stress"] - atoms.get_stress()).max() < 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_prediction_is_the_vendors_calculator(name):
    """Also in one batch, where version 0.2.0 of the vendor differs from single."""
    backend = model(name)
    assert backend.has_inversion
    check_backend(backend, structures())
    calculator = vendor_calculator(name=name.removeprefix("chgnet-"))
    assert_same(calculator, predict(backend, structures()), samples().values())


def test_parameters_of_0_3_0_by_kind_and_place():
    records = {w.name: w for w in model().path_weights()}
    sizes: dict[str, int] = {}
    for weight in records.values():
        sizes[weight.kind] = sizes.get(weight.kind, 0) + weight.size
    assert model().total_parameters == sum(sizes.values()) == 412_525
    atom_conv, bond_conv = 64 * (2 * 192 + 2 * 64 + 64), 64 * (2 * 256 + 2 * 64 + 64)
    linear = 94 * 64 + 64 * 31 + 4 * atom_conv + 3 * bond_conv + 3 * 2 * 64 * 256
    linear += 64 + 3 * 64**2 + 64
    radial = 3 * 64 * 31 + 2 * 31
    assert sizes["linear"] == linear == 401_344
    assert sizes["radial"] == radial
    assert sizes["scale_shift"] == 94
    assert {w.kind for w in records.values() if w.paths} == {"linear", "scale_shift"}
    for weight in records.values():
        for path in weight.paths:
            assert path.shape == weight.shape
            assert (path.irrep_in, path.irrep_out, path.l) == ("0e", "0e", 0)
    embedding = records["atom_embedding.embedding.weight"]
    assert embedding.role == "embedding"
    assert embedding.elements[0] == "H"
    assert len(embedding.elements) == 94
    assert embedding.alive(["O"], None).reshape(94, 64).sum(1).nonzero()[0] == [7]
    shift = records["composition_model.fc.weight"]
    assert shift.alive(["H", "O"], None).nonzero()[0].tolist() == [0, 7]
    third = records["bond_conv_layers.2.mlp_out.layers.1.weight"]
    assert (third.role, third.layer) == ("interaction", 2)
    assert records["site_wise.weight"].role == "readout"


@pytest.mark.parametrize(
    "properties",
    [
        ("energy", "forces"),
        ("forces",),
        ("magmoms",),
        ("energy", "forces", "stress", "magmoms"),
    ],
)
@pytest.mark.parametrize("name", NAMES[:2])
def test_entries_called_dead_are_exactly_those_without_gradient(name, properties):
    backend = model(name)
    frames = [nickel_oxide(), ase.build.molecule("H2O")]
    weights = {
        n: p.detach().clone().requires_grad_()
        for n, p in backend.model.named_parameters()
    }
    batch = backend.batch([backend.graph(atoms) for atoms in frames])
    out = backend.predict(batch, weights, properties, training=True)
    assert out.keys() == set(properties)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (torch.rand(v.shape, generator=generator) * (v + v**2)).sum()
        for v in out.values()
    )
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for record, gradient in zip(backend.path_weights(), gradients, strict=True):
        alive = record.alive({"H", "O", "Ni"}, None, properties)
        found = np.zeros(record.size)
        if gradient is not None:
            found = gradient.flatten().numpy()
        assert np.count_nonzero(found[~alive]) == 0, record.name
        # A channel of the first layer is closed: its gate is zero in float32.
        if record.kind == "linear":
            assert np.count_nonzero(found[alive]) >= 0.98 * alive.sum(), record.name


def test_structures_without_a_cell_need_no_box():
    """A molecule, a slab with two cell vectors, a lone atom: as in a large box."""
    water = ase.build.molecule("H2O")
    water.positions += 50
    slab = ase.build.fcc111("Cu", (1, 1, 3), vacuum=6)
    open_slab = slab.copy()
    open_slab.cell[2] = 0
    bare = [water, open_slab, ase.Atoms("Ni")]
    boxed = [water.copy(), slab, ase.Atoms("Ni")]
    for atoms in (boxed[0], boxed[2]):
        atoms.set_cell([20, 20, 20])
        atoms.pbc = True
    ours = predict(model(), structures(bare))
    assert not any("stress" in found for found in ours)
    assert_same(vendor_calculator(), ours, boxed)
    other = predict(model(), structures([water]), properties=["energy", "magmoms"])
    assert other[0].keys() == {"energy", "magmoms"}


def test_forces_and_stress_are_derivatives_in_float64():
    backend, atoms = model(dtype="float64"), nickel_oxide()
    analytic = predict(backend, structures([atoms]))[0]

    def energies(change):
        changed = [atoms.copy(), atoms.copy()]
        for copy, sign in zip(changed, (1e-5, -1e-5), strict=True):
            change(copy, sign)
        up, down = predict(backend, structures(changed), properties=["energy"])
        return (up["energy"] - down["energy"]) / 2e-5

    def move(copy, step):
        copy.positions[1, 2] += step

    def shear(copy, step):
        strain = np.eye(3)
        strain[0, 1] = strain[1, 0] = step / 2  # Voigt component xy
        copy.set_cell(copy.cell @ strain, scale_atoms=True)

    def stretch(copy, step):
        strain = np.diag([1, 1, 1 + step])
        copy.set_cell(copy.cell @ strain, scale_atoms=True)

    volume = atoms.get_volume()
    assert -energies(move) == pytest.approx(analytic["forces"][1, 2], abs=1e-6)
    assert energies(shear) / volume == pytest.approx(analytic["stress"][5], abs=1e-7)
    assert energies(stretch) / volume == pytest.approx(analytic["stress"][2], abs=1e-7)


def test_stress_of_a_left_handed_cell_has_the_same_sign():
    atoms = nickel_oxide()
    swapped = atoms.copy()
    swapped.set_cell(atoms.cell[[1, 0, 2]])
    assert swapped.cell.handedness == -1
    expected, found = predict(model(dtype="float64"), structures([atoms, swapped]))
    assert np.abs(expected["stress"] - found["stress"]).max() < 1e-12


def test_a_loss_on_forces_and_moments_is_differentiated():
    """Against a finite difference, in a weight that both depend on."""
    backend = model(dtype="float64")
    batch = backend.batch([backend.graph(nickel_oxide())])
    name = "atom_conv_layers.1.mlp_out.layers.1.weight"
    weight = dict(backend.model.named_parameters())[name].detach().clone()

    def loss(weight, training):
        out = backend.predict(
            batch, {name: weight}, ["forces", "magmoms"], training=training
        )
        return (out["forces"] ** 2).sum() + out["magmoms"].sum()

    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, True), leaf)
    step = torch.zeros_like(weight)
    step[3, 5] = 1e-5
    numeric = (loss(weight + step, False) - loss(weight - step, False)) / 2e-5
    assert gradient[3, 5].item() == pytest.approx(numeric.item(), rel=1e-5)
    assert not loss(weight, False).requires_grad


def random_delta(backend) -> DeltaFile:
    """Return a delta that changes every linear weight and two reference energies."""
    stored = backend.stored_weights()
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for weight in backend.path_weights():
        if weight.kind == "linear":
            old = stored[weight.name]
            alive = torch.from_numpy(weight.alive({"Ni", "O"}, None)).view(old.shape)
            noise = 0.02 * alive * torch.randn(old.shape, generator=generator)
            changes[weight.name] = exact_change(old, old + noise)
    metadata = {"model": backend.model_name, "base": fingerprint(stored)}
    return DeltaFile(changes, {"Ni": 11.7, "O": -432.1}, metadata)


@pytest.mark.parametrize("name", NAMES)
def test_vendors_tools_read_the_merged_file(name, tmp_path):
    """CHGNet.from_file, the calculator, a relaxation, and the trainer's own file."""
    backend, path = model(name), tmp_path / "merged.pth.tar"
    delta = random_delta(backend)
    pathtune.merge(backend, delta, path)
    frames = [nickel_oxide(1), nickel_oxide(2)]
    weights = delta.apply(backend.stored_weights())
    ours = predict(backend, structures(frames), weights=weights, shifts=delta.shifts)
    assert_same(vendor_calculator(path), ours, frames)
    assert_same(pathtune.calculator(backend, delta), ours, frames)
    with vendor_code():
        from chgnet.model import CHGNet, StructOptimizer
        from pymatgen.io.ase import AseAtomsAdaptor

        vendor = CHGNet.from_file(path)
        released = CHGNet.load(model_name=name[7:], use_device="cpu", verbose=False)
        structure = AseAtomsAdaptor.get_structure(frames[0])
        found = vendor.predict_structure(structure)
        relaxer = StructOptimizer(vendor, use_device="cpu")
        relaxed = relaxer.relax(frames[0].copy(), steps=2, verbose=False)
        vendor_file = {"model": CHGNet.from_file(path).as_dict()}
    assert found["e"] * 4 == pytest.approx(ours[0]["energy"], rel=1e-6)
    first = relaxed["trajectory"].energies[0]
    assert first == pytest.approx(ours[0]["energy"], rel=1e-6)
    assert vendor.state_dict().keys() == released.state_dict().keys()
    assert vendor.version == released.version
    torch.save(vendor_file, tmp_path / "trained.pth.tar")
    reloaded = pathtune.load(
        str(tmp_path / "trained.pth.tar"), device="cpu", trust_checkpoint=True
    )
    before, after = backend.reference_energies(), reloaded.reference_energies()
    assert after["Ni"] - before["Ni"] == pytest.approx(11.7, abs=1e-5)
    assert after["O"] - before["O"] == pytest.approx(-432.1, abs=5e-5)
    assert all(after[e] == before[e] for e in before if e not in ("Ni", "O"))


def test_a_merged_file_with_other_moments_is_refused(tmp_path, monkeypatch):
    backend, path = model(), tmp_path / "merged.pth.tar"
    moments = {"site_wise.bias": backend.stored_weights()["site_wise.bias"] + 1e-3}
    save = backend.save
    monkeypatch.setattr(
        backend, "save", lambda path, weights, _: save(path, weights | moments, {})
    )
    delta = DeltaFile({}, {}, {"base": fingerprint(backend.stored_weights())})
    with pytest.raises(PathtuneError, match="magmoms differs"):
        pathtune.merge(backend, delta, path)
    assert not path.exists()


def small(tmp_path, **arguments) -> str:
    """Write a CHGNet of another architecture, as the vendor's trainer does."""
    with vendor_code():
        from chgnet.model import CHGNet

        torch.manual_seed(0)
        sizes = dict.fromkeys(("atom", "bond", "angle"), 8)
        sizes = {f"{name}_fea_dim": n for name, n in sizes.items()}
        sizes |= {"atom_conv_hidden_dim": 8, "bond_conv_hidden_dim": 8}
        made = CHGNet(**sizes, num_radial=5, num_angular=5, **arguments)
    path = tmp_path / "small.pth.tar"
    torch.save({"model": made.as_dict()}, path)
    trust.remember(path)
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mlp_first": False, "read_out": "attn", "update_angle": False},
        {"gMLP_norm": "batch", "n_conv": 2, "conv_dropout": 0.5, "is_intensive": True},
        {"final_mlp": "gated", "learnable_rbf": False, "mlp_out_bias": True},
    ],
)
def test_other_architectures(tmp_path, arguments):
    backend = pathtune.load(small(tmp_path, **arguments), device="cpu")
    frames = list(samples().values())
    check_backend(backend, structures(frames))
    calculator = vendor_calculator(tmp_path / "small.pth.tar")
    assert_same(calculator, predict(backend, structures(frames)), frames)


def test_without_a_composition_model_shifts_are_refused(tmp_path):
    backend = pathtune.load(small(tmp_path, composition_model=None), device="cpu")
    assert not backend.has_shift_by_element
    assert set(backend.reference_energies().values()) == {0.0}
    backend.save(tmp_path / "same.pth.tar", {}, {})
    with pytest.raises(PathtuneError, match="no composition model"):
        backend.save(tmp_path / "shifted.pth.tar", {}, {"Ni": 1.0})
    assert not (tmp_path / "shifted.pth.tar").exists()


def test_a_composition_model_that_is_no_energy_by_element_is_refused(tmp_path):
    path = small(tmp_path, composition_model="MPF")  # eV beside the model's eV/atom
    with pytest.raises(PathtuneError, match="composition model"):
        pathtune.load(path, device="cpu")


def test_names_and_the_files_they_mean():
    infos = {i.name: i for i in pathtune.models() if i.backend == "chgnet"}
    assert set(infos) == set(NAMES)
    for name, info in infos.items():
        assert info.available, info.reason
        assert name.removeprefix("chgnet-") in info.checkpoint
    assert pathtune.load("CHGNet", device="cpu").model_name == "chgnet-0.3.0"
    bases = {fingerprint(model(n).stored_weights())["site_wise.bias"] for n in NAMES}
    assert len(bases) == 3


def test_a_local_copy_of_a_released_file_is_known(tmp_path):
    import chgnet

    for version in ("0.3.0", "0.2.0"):
        (found,) = (tmp_path / chgnet.__file__).parent.glob(
            f"pretrained/{version}/*.pth.tar"
        )
        backend = pathtune.load(str(found), device="cpu")
        stored = model(f"chgnet-{version}").stored_weights()
        assert fingerprint(backend.stored_weights()) == fingerprint(stored)


def test_clear_errors(tmp_path):
    path = tmp_path / "m.pth.tar"
    with pytest.raises(UsageError, match="Or give a checkpoint file"):
        pathtune.load(str(path))
    with pytest.raises(UsageError, match=r"Did you mean 'chgnet-0\.3\.0'"):
        pathtune.load("chgnet-0.3.1")
    with pytest.raises(UsageError, match="no heads"):
        pathtune.load("chgnet", head="PBE")
    path.write_text("no checkpoint")
    with pytest.raises(PathtuneError, match="--trust-checkpoint"):
        pathtune.load(str(path))
    for content in (b"no checkpoint", {"model": {}}, {"epoch": 3}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(PathtuneError, match="cannot be read as a CHGNet"):
            pathtune.load(str(path), trust_checkpoint=True)
    with pytest.raises(UsageError, match="float32"):
        pathtune.calculator(model(dtype="float64"))


def test_nothing_is_printed_for_people_or_programs(capfd):
    backend = pathtune.load("chgnet", device="cpu")
    predict(backend, structures())
    pathtune.calculator(backend)
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def magnetic(tmp_path_factory):
    """Frames of NiO with other moments, and a tuning of 20 steps on these alone."""
    folder = tmp_path_factory.mktemp("magnetic")
    frames = [nickel_oxide(seed, strain=0.01 * (seed % 3 - 1)) for seed in range(8)]
    for atoms, base in zip(frames, predict(model(), structures(frames)), strict=True):
        signs = np.where(atoms.symbols == "Ni", [1, 1, -1, -1], 1)
        atoms.arrays["REF_magmoms"] = signs * 0.8 * base["magmoms"]
    frames[1].arrays["REF_magmoms"][2] = np.nan
    del frames[2].arrays["REF_magmoms"]
    frames[2].info["REF_energy"] = -20.0
    files = {name: str(folder / f"{name}.xyz") for name in ("train", "valid")}
    ase.io.write(files["train"], frames[:6])
    ase.io.write(files["valid"], frames[6:])
    config = RunConfig(
        model="chgnet",
        **files,
        output=str(folder / "run"),
        max_steps=20,
        eval_every=10,
        batch_size=4,
        energy_weight=0,
        device="cpu",
    )
    return folder, pathtune.finetune(config)


def test_moments_are_learned(magnetic):
    folder, results = magnetic
    before, after = results["zero_shot"], results["valid"]
    assert before["magmom_mae_mu_b"] > 0.1
    assert after["magmom_mae_mu_b"] < 0.5 * before["magmom_mae_mu_b"]
    delta = DeltaFile.load(folder / "run" / "delta.safetensors")
    assert "site_wise.weight" in delta.changes
    # What only energies depend on, and what nothing depends on, was not touched.
    for absent in ("mlp.layers.0.weight", "atom_conv_layers.3", "angle_layers.2"):
        assert not any(name.startswith(absent) for name in delta.changes)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["valid"].keys() >= {"magmom_mae_mu_b"}


def test_evaluate_measures_and_writes_moments(magnetic, tmp_path, capsys, monkeypatch):
    folder, results = magnetic
    output = tmp_path / "predicted.xyz"
    delta = folder / "run" / "delta.safetensors"
    line = f"evaluate {folder / 'valid.xyz'} --model chgnet --delta {delta}"
    line += f" --output {output} --device cpu --json"
    monkeypatch.setattr(sys, "argv", ["pathtune", *line.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)["magmom_mae_mu_b"]
    assert found == pytest.approx(results["valid"]["magmom_mae_mu_b"], abs=1e-6)
    differences = []
    for atoms in ase.io.read(output, ":"):
        moments = atoms.get_magnetic_moments()
        assert np.array_equal(moments, atoms.arrays["pathtune_magmoms"])
        differences.append(np.abs(atoms.arrays["REF_magmoms"]) - moments)
    assert np.abs(differences).mean() == pytest.approx(found, abs=1e-6)


def test_without_labels_the_moments_head_stays(tmp_path):
    frames = [nickel_oxide(seed) for seed in range(5)]
    for index, atoms in enumerate(frames):
        atoms.info["REF_energy"] = -25.0 + 0.1 * index
    ase.io.write(tmp_path / "train.xyz", frames)
    config = RunConfig(
        model="chgnet",
        train=str(tmp_path / "train.xyz"),
        output=str(tmp_path / "run"),
        max_steps=2,
        device="cpu",
    )
    results = pathtune.finetune(config)
    delta = DeltaFile.load(tmp_path / "run" / "delta.safetensors")
    assert results["sparsity"]["updated_parameters"] > 0
    assert not any(name.startswith("site_wise") for name in delta.changes)
    assert "magmom_mae_mu_b" not in results["valid"]
