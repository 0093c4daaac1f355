"""MACE: parity with the vendor's tools, path records, heads, merging, symmetry."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch

import pathtune
from pathtune import delta as deltas
from pathtune import trust
from pathtune.backends import mace as backend_module
from pathtune.backends.base import undisturbed
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.methods import sparse
from pathtune.prediction import predict
from pathtune.properties import PROPERTIES, Structure
from pathtune.testing import check_backend, check_method, symmetry_errors

pytestmark = pytest.mark.mace

ELEMENTS = ("H", "C", "O", "Ni", "Cu")
PLAIN = {
    "interaction_cls_first": "RealAgnosticInteractionBlock",
    "interaction_cls": "RealAgnosticResidualInteractionBlock",
}
# As the released models that are density-normalised (MP-0b2 and later).
DENSITY = {
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    "pair_repulsion": True,
    "distance_transform": "Agnesi",
    "correlation": 2,
}
# As the released models with several heads.
HEADS = {
    "interaction_cls_first": "RealAgnosticResidualNonLinearInteractionBlock",
    "interaction_cls": "RealAgnosticResidualNonLinearInteractionBlock",
    "edge_irreps": "4x0e+4x1o",
    "use_agnostic_product": True,
    "readout_cls": "NonLinearReadoutBlock",
    "heads": ["pbe", "r2scan", "ccsd"],
    "pair_repulsion": True,
    "distance_transform": "Agnesi",
    "correlation": 2,
}
BIASES = HEADS | {"readout_cls": "NonLinearBiasReadoutBlock"}
# Name -> (settings, precision of the file, head).
VARIANTS = {
    "plain": (PLAIN, torch.float32, None),
    "density": (DENSITY, torch.float32, None),
    "heads": (HEADS, torch.float64, "r2scan"),
    "biases": (BIASES, torch.float64, "ccsd"),
}


def build(
    settings,
    elements=ELEMENTS,
    dtype=torch.float32,
    hidden="8x0e+8x1o",
    max_ell=2,
    mlp="4x0e",
):
    """Return a random model of the vendor's, with forces of some eV/Å."""
    with undisturbed(dtype):
        warnings.simplefilter("ignore")
        from mace import modules

        torch.manual_seed(1)
        from ase.data import atomic_numbers
        from e3nn import o3

        given = {"correlation": 3, **PLAIN, **settings}
        classes = {
            key: modules.interaction_classes[given.pop(key)]
            for key in ("interaction_cls", "interaction_cls_first")
        }
        if "readout_cls" in given:
            readout = getattr(modules.blocks, given.pop("readout_cls"))
            classes["readout_cls"] = readout
        if "edge_irreps" in given:
            given["edge_irreps"] = o3.Irreps(given["edge_irreps"])
        n = len(given.get("heads", [0]))
        energies = -torch.arange(1.0, 1 + n * len(elements)).reshape(n, -1).numpy()
        model = modules.ScaleShiftMACE(
            atomic_inter_scale=[10.0 + i for i in range(n)] if n > 1 else 10.0,
            atomic_inter_shift=[0.25 * i for i in range(n)] if n > 1 else 0.25,
            **{"radial_MLP": [8, 8], **given},
            **classes,
            r_max=4.5,
            num_bessel=6,
            num_polynomial_cutoff=5,
            max_ell=max_ell,
            num_interactions=2,
            num_elements=len(elements),
            hidden_irreps=o3.Irreps(hidden),
            atomic_energies=energies if n > 1 else energies[0],
            avg_num_neighbors=8.0,
            atomic_numbers=[atomic_numbers[symbol] for symbol in elements],
            MLP_irreps=o3.Irreps(mlp),
            gate=torch.nn.functional.silu,
        )
    for name, parameter in model.named_parameters():
        if name.endswith(".beta"):  # zero in a new model: no density normalisation
            parameter.data.fill_(1.0)
    return model


def written(model, path) -> str:
    """Save a model as the vendor does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: written(build(settings, dtype=dtype), folder / f"{name}.model")
        for name, (settings, dtype, _) in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def load(paths):
    """Load a variant with its head, each precision and head once."""
    loaded = {}

    def load(name, dtype="float32", head=None):
        head = head or VARIANTS[name][2]
        if (name, dtype, head) not in loaded:
            loaded[name, dtype, head] = pathtune.load(
                paths[name],
                dtype=dtype,
                head=head,
                device="cpu",
                trust_checkpoint=True,
            )
        return loaded[name, dtype, head]

    return load


@pytest.fixture(scope="module")
def merged(load, tmp_path_factory):
    """Path of each variant with a random delta, merged."""
    folder = tmp_path_factory.mktemp("merged")
    files = {}
    for name in VARIANTS:
        files[name] = str(folder / f"{name}.model")
        pathtune.merge(load(name), random_delta(load(name)), files[name])
    return files


def samples() -> list[Structure]:
    methanol = ase.build.molecule("CH3OH")
    oxide = ase.build.bulk("NiO", "rocksalt", a=4.2)
    oxide.set_cell(oxide.cell + 0.1 * np.eye(3)[[1, 2, 0]], scale_atoms=True)
    copper = ase.build.bulk("Cu", cubic=True)
    for seed, atoms in enumerate((methanol, oxide, copper)):
        atoms.rattle(0.05, seed=seed)
    return [Structure(a) for a in (methanol, oxide, copper, ase.Atoms("O"))]


def random_delta(backend, elements=("H", "O", "Ni"), std=0.05) -> DeltaFile:
    """Return a delta of random changes, as a training would leave it."""
    module = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=sparse,
        config=sparse.Config(init_std=std, initial_threshold=std / 2),
        selection="everything",
        elements=elements,
        head=backend.head,
        seed=1,
    )
    stored = backend.stored_weights()
    shifts = {"H": -3.25, "O": -432.1, "Ni": 11.7}
    metadata = {"model": backend.model_name, "base": fingerprint(stored)}
    return DeltaFile(module.changes(stored), shifts, {**metadata, "head": backend.head})


def vendor_calculator(path, dtype="float32", head=None):
    with undisturbed():
        warnings.simplefilter("ignore")
        from mace.calculators import MACECalculator

        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        return MACECalculator(
            model_paths=path, device="cpu", default_dtype=dtype, head=head
        )


def assert_same(calculator, expected, tolerance=1e-6) -> None:
    """Compare a calculator with predictions of `samples`; float32 rounds energies."""
    for structure, ours in zip(samples(), expected, strict=True):
        atoms = structure.atoms.copy()
        atoms.calc = calculator
        energy = atoms.get_potential_energy()
        rounding = 4 * abs(energy) * 2**-24
        assert abs(ours["energy"] - energy) < tolerance * len(atoms) + rounding
        assert np.abs(ours["forces"] - atoms.get_forces()).max() < 10 * tolerance
        if atoms.cell.rank == 3:
            assert np.abs(ours["stress"] - atoms.get_stress()).max() < tolerance


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_contract(load, name, dtype):
    check_backend(load(name, dtype), samples())


@pytest.mark.parametrize("method", ["sparse", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_contract_of_the_methods(load, name, method):
    check_method(load(name, "float64"), method, samples()[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_prediction_is_the_vendors_calculator(load, paths, name, dtype):
    vendor = vendor_calculator(paths[name], dtype, VARIANTS[name][2])
    assert_same(vendor, predict(load(name, dtype), samples(), batch_size=1))


# Path records


def test_kinds_of_mace_off23_medium_with_three_elements():
    """The counts of the released architecture, cut to H, C, O."""
    model = build(
        {"radial_MLP": [64, 64, 64]},
        elements=("H", "C", "O"),
        hidden="128x0e+128x1o",
        max_ell=3,
        mlp="16x0e",
    )
    backend = backend_module.Backend()
    backend._original, backend._all_heads = model, ("Default",)
    backend.elements = ("H", "C", "O")
    sizes: dict[str, int] = {}
    for weight in backend.path_weights():
        sizes[weight.kind] = sizes.get(weight.kind, 0) + weight.size
    # Two first radial layers of 64 weights a basis function, and six of eight here.
    assert sizes.pop("radial") + 2 * 64 * 2 == 132_096
    assert sizes == {"linear": 330_256, "fctp": 245_760, "contraction": 43_776}


@pytest.mark.parametrize("name", VARIANTS)
def test_entries_called_dead_are_exactly_those_without_gradient(load, name):
    """A generic loss on energy and forces reaches every alive entry and no other."""
    backend = load(name, "float64")
    positions = np.random.default_rng(0).normal(size=(6, 3)) * 1.2
    atoms = ase.Atoms("NiO2H3", positions=positions)
    weights = {
        n: p.detach().clone().requires_grad_()
        for n, p in backend.model.named_parameters()
    }
    batch = backend.batch([backend.graph(atoms)])
    out = backend.predict(batch, weights, ["energy", "forces"], training=True)
    loss = out["energy"].sum() + (out["forces"] ** 2).sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    records = {w.name: w for w in backend.path_weights()}
    for parameter, gradient in zip(weights, gradients, strict=True):
        alive = records[parameter].alive(set(atoms.symbols), backend.head)
        reached = np.abs(gradient.flatten().numpy()) > 0
        assert not reached[~alive].any(), parameter
        assert reached[alive].mean() > 0.99, parameter


def test_elements_and_heads_have_their_axes(load):
    dead = {
        name: {
            w.name: w.size - int(w.alive({"H", "O"}, VARIANTS[name][2]).sum())
            for w in load(name).path_weights()
        }
        for name in ("density", "heads")
    }
    density, heads = dead["density"], dead["heads"]
    assert density["node_embedding.linear.weight"] == 3 * 8
    assert density["interactions.0.skip_tp.weight"] == 3 * 3 * 8 * 8
    contraction = "products.0.symmetric_contractions.contractions.0.weights_max"
    assert density[contraction] == 3 * 3 * 8
    assert heads[contraction] == 0, "one product basis for all elements"
    assert heads["interactions.1.source_embedding.weight"] == 3 * 8
    assert heads["readouts.0.linear.weight"] == 2 * 8
    assert heads["readouts.1.linear_1.weight"] == 2 * 8 * 4
    assert heads["readouts.1.linear_2.weight"] == (3 * 3 - 1) * 4


def test_what_is_no_path_weight_is_not_called_one(load):
    """Radial networks, normalisations, biases; ZBL, Agnesi and E0 are no parameters."""
    kinds = {w.name: w.kind for w in load("biases").path_weights()}
    assert kinds["interactions.0.alpha"] == kinds["interactions.0.beta"] == "other"
    assert kinds["readouts.1.linear_mid.bias"] == "other"
    assert kinds["readouts.1.linear_mid.weight"] == "linear"
    assert {kinds[n] for n in kinds if "density_fn" in n} == {"radial"}
    assert {kinds[n] for n in kinds if "conv_tp_weights" in n} == {"radial"}
    assert not any("pair" in n or "energies" in n or "scale_shift" in n for n in kinds)


def test_weights_of_couplings_that_do_not_exist_are_never_alive(tmp_path):
    """Pseudoscalars from a symmetric product: the vendor keeps a weight of zeros."""
    file = written(build(PLAIN, hidden="4x0e+4x0o"), tmp_path / "odd.model")
    backend = pathtune.load(file, device="cpu", trust_checkpoint=True)
    check_backend(backend, samples())
    unused = [w for w in backend.path_weights() if not w.properties]
    assert unused
    weights = {
        n: p.detach().clone().requires_grad_()
        for n, p in backend.model.named_parameters()
    }
    batch = backend.batch([backend.graph(samples()[0].atoms)])
    energy = backend.predict(batch, weights, ["energy"], training=True)["energy"]
    gradients = torch.autograd.grad(
        energy.sum(), list(weights.values()), materialize_grads=True
    )
    by_name = dict(zip(weights, gradients, strict=True))
    for weight in unused:
        assert not weight.alive(ELEMENTS, None).any()
        assert not by_name[weight.name].any()
    used = [w for w in backend.path_weights() if w.kind == "contraction"]
    assert all(w.properties == PROPERTIES for w in used if w not in unused)


# Merging


@pytest.mark.parametrize("n_atoms", [40, 6], ids=["by element", "as the vendor"])
@pytest.mark.parametrize("name", ["plain", "density", "heads"])
def test_rewritten_product_basis_and_its_second_derivative(load, name, n_atoms):
    backend = load(name, "float64", VARIANTS[name][2])
    plain = backend.model.products[0].symmetric_contractions
    rewritten = backend.rewritten().products[0].symmetric_contractions
    (n_elements,) = {w.shape[0] for w in plain.parameters()}
    channels = plain.contractions[0].num_features
    dim = sum(ir.dim for _, ir in plain.irreps_in)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_atoms, channels, dim, generator=generator, dtype=torch.float64)
    species = torch.randint(n_elements, (n_atoms,), generator=generator)
    one_hot = torch.nn.functional.one_hot(species, n_elements).double()
    found = []
    for basis in (plain, rewritten):
        weights = {
            name: parameter.clone().requires_grad_()
            for name, parameter in basis.named_parameters()
        }
        leaf = x.clone().requires_grad_()
        out = torch.func.functional_call(basis, weights, (leaf, one_hot))
        (first,) = torch.autograd.grad((out**2).sum(), leaf, create_graph=True)
        leaves = [leaf, *weights.values()]
        found.append([out, first, *torch.autograd.grad((first**2).sum(), leaves)])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_file_in_the_vendors_calculator(load, merged, name):
    backend, head = load(name), VARIANTS[name][2]
    delta = random_delta(backend)
    ours = predict(
        backend,
        samples(),
        weights=delta.apply(backend.stored_weights()),
        shifts=delta.shifts,
        batch_size=1,
    )
    assert_same(vendor_calculator(merged[name], head=head), ours)
    assert_same(pathtune.calculator(backend, delta), ours)


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_file_has_what_the_base_had(load, merged, name):
    """Elements, precision, dead entries, heads, and the vendor's training flags."""
    base, head = load(name), VARIANTS[name][2]
    tuned = pathtune.load(merged[name], device="cpu", head=head, trust_checkpoint=True)
    assert tuned.elements == base.elements == ELEMENTS
    before, after = base.stored_weights(), tuned.stored_weights()
    changed = 0
    for weight in base.path_weights():
        old, new = before[weight.name].flatten(), after[weight.name].flatten()
        assert new.dtype == VARIANTS[name][1]
        alive = torch.from_numpy(weight.alive({"H", "O", "Ni"}, head))
        assert torch.equal(old[~alive], new[~alive]), weight.name
        changed += int((old != new).sum())
    assert changed == random_delta(base).updated_parameters > 0
    shifts = random_delta(base).shifts
    for symbol, energy in tuned.reference_energies().items():
        assert energy == pytest.approx(
            base.reference_energies()[symbol] + shifts.get(symbol, 0), rel=1e-6
        )
    flags = {n: p.requires_grad for n, p in base._original.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in tuned._original.named_parameters()}


def test_merging_into_one_head_leaves_the_readouts_of_the_others(merged, load):
    other = pathtune.load(merged["heads"], head="pbe", trust_checkpoint=True)
    original = load("heads", head="pbe")
    assert other.reference_energies() == original.reference_energies()
    assert (
        load("heads", head="ccsd").reference_energies() != original.reference_energies()
    )
    for weight in original.path_weights():
        if weight.role == "readout":
            mine = torch.from_numpy(weight.alive(ELEMENTS, "pbe"))
            old, new = (
                b.stored_weights()[weight.name].flatten()[mine]
                for b in (original, other)
            )
            assert torch.equal(old, new)


def vendor_command(name, *arguments, cwd) -> None:
    command = [Path(sys.executable).with_name(name), *map(str, arguments)]
    subprocess.run(command, check=True, cwd=cwd, capture_output=True)


def test_mace_eval_configs_reads_the_merged_file(load, merged, tmp_path):
    frames = [s.atoms for s in samples()]
    ase.io.write(tmp_path / "frames.xyz", frames)
    vendor_command(
        "mace_eval_configs",
        *("--configs=frames.xyz", f"--model={merged['heads']}", "--output=out.xyz"),
        *("--compute_stress", "--default_dtype=float64", "--head=r2scan"),
        cwd=tmp_path,
    )
    backend = load("heads", "float64")
    delta = random_delta(backend)
    weights = delta.apply(backend.stored_weights())
    ours = predict(backend, samples(), weights=weights, shifts=delta.shifts)
    for atoms, expected in zip(
        ase.io.read(tmp_path / "out.xyz", ":"), ours, strict=True
    ):
        assert atoms.info["MACE_energy"] == pytest.approx(expected["energy"], abs=1e-6)
        assert np.abs(atoms.arrays["MACE_forces"] - expected["forces"]).max() < 1e-6
        if "stress" in expected:
            matrix = np.reshape(atoms.info["MACE_stress"], (3, 3))
            voigt = matrix[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            assert np.abs(voigt - expected["stress"]).max() < 1e-7


def test_mace_create_lammps_model_reads_the_merged_file(merged, tmp_path):
    vendor_command("mace_create_lammps_model", merged["density"], cwd=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.jit.load(merged["density"] + "-lammps.pt") is not None


# Precision, symmetry, derivatives


@pytest.mark.parametrize("name", ["plain", "density", "heads"])
def test_symmetry_in_float64(load, merged, name):
    """Base and merged, from files in float32 and float64."""
    tuned = pathtune.load(
        merged[name],
        dtype="float64",
        device="cpu",
        head=VARIANTS[name][2],
        trust_checkpoint=True,
    )
    for backend in (load(name, "float64"), tuned):
        for structure in samples():
            found = symmetry_errors(backend, structure, {})
            assert set(found) == {"rotation", "translation", "permutation", "inversion"}
            for operation, (energy, forces) in found.items():
                assert energy < 1e-12, operation
                assert forces < 1e-11, operation


def test_cast_couplings_would_not_be_symmetric_to_float64(paths, monkeypatch):
    monkeypatch.setattr(backend_module, "_compute_couplings", lambda model: None)
    cast = pathtune.load(paths["plain"], dtype="float64", trust_checkpoint=True)
    energy, forces = symmetry_errors(cast, samples()[0], {})["rotation"]
    assert energy > 1e-12 or forces > 1e-11


def test_forces_and_stress_are_derivatives_in_float64(load):
    backend = load("density", "float64")
    structure = samples()[1]
    atoms = structure.atoms

    def energy(changed):
        return predict(backend, [Structure(changed)])[0]["energy"]

    analytic = predict(backend, [structure])[0]
    step = 1e-4
    for axis in range(3):
        moved = [atoms.copy(), atoms.copy()]
        for sign, copy in zip((1, -1), moved, strict=True):
            copy.positions[1, axis] += sign * step
        numeric = -(energy(moved[0]) - energy(moved[1])) / (2 * step)
        assert numeric == pytest.approx(analytic["forces"][1, axis], abs=1e-6)
    voigt = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    for component, (i, j) in enumerate(voigt):
        strained = [atoms.copy(), atoms.copy()]
        for sign, copy in zip((1, -1), strained, strict=True):
            strain = np.eye(3)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            copy.set_cell(copy.cell @ strain, scale_atoms=True)
        numeric = (energy(strained[0]) - energy(strained[1])) / (2 * step)
        assert numeric / atoms.get_volume() == pytest.approx(
            analytic["stress"][component], abs=1e-7
        )


def test_only_what_is_asked_for_is_computed(load):
    backend = load("density")
    batch = backend.batch([backend.graph(s.atoms) for s in samples()])
    for properties in ({"energy"}, {"forces"}, {"energy", "forces"}, {"stress"}):
        out = backend.predict(batch, {}, properties)
        assert set(out) == properties
        assert not any(value.requires_grad for value in out.values())
    assert not batch["positions"].requires_grad


def test_a_model_that_embeds_the_charge_sees_it(tmp_path):
    specs = {"total_charge": {"type": "continuous", "per": "graph", "in_dim": 1}}
    specs["total_charge"]["emb_dim"] = 4
    file = written(
        build({"embedding_specs": specs, "use_embedding_readout": True}),
        tmp_path / "charged.model",
    )
    backend = pathtune.load(file, device="cpu", trust_checkpoint=True)
    check_backend(backend, samples())
    roles = {w.name: (w.kind, w.role) for w in backend.path_weights()}
    assert roles["joint_embedding.project.0.weight"] == ("other", "embedding")
    assert roles["embedding_readout.linear.weight"] == ("linear", "readout")
    energies = []
    for charge in (0, 1):
        atoms = samples()[0].atoms
        atoms.info["charge"] = charge
        energies.append(predict(backend, [Structure(atoms)])[0]["energy"])
        atoms.calc = vendor_calculator(file)
        assert atoms.get_potential_energy() == pytest.approx(energies[-1], abs=1e-5)
    assert abs(energies[0] - energies[1]) > 1e-3


# Names, files, errors


def test_names_and_files_are_the_vendors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with undisturbed():
        warnings.simplefilter("ignore")
        from mace.calculators import foundations_models as vendor
    infos = {i.name: i for i in pathtune.models() if i.backend == "mace"}
    released = {
        **vendor.mace_mp_urls,
        **{f"mace-off23-{size}": url for size, url in vendor.mace_off_urls.items()},
    }
    assert infos.keys() == released.keys()
    for name, url in released.items():
        assert infos[name].checkpoint.partition(" (")[0] == url.rpartition("/")[2]
        assert not infos[name].available
    assert backend_module.Backend.knows("small_off")
    assert not backend_module.Backend.knows("huge")


@pytest.mark.parametrize("name", ["medium-0b3", "mace-off23-small", "medium_off"])
def test_a_released_name_without_network_and_with_a_local_copy(
    name, paths, tmp_path, monkeypatch, capsys
):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(PathtuneError, match=r"no network.*give the path") as caught:
        pathtune.load(name)
    expected = Path(str(caught.value).partition("put it at ")[2].partition(", or")[0])
    assert expected.parent == tmp_path / "mace"
    assert not expected.exists()
    expected.write_bytes(Path(paths["density"]).read_bytes())
    with pytest.raises(PathtuneError, match="--trust-checkpoint"):
        pathtune.load(name)
    backend = pathtune.load(name, device="cpu", trust_checkpoint=True)
    assert backend.elements == ELEMENTS
    assert backend.model_name == name.replace("medium_off", "mace-off23-medium")
    known = {i.name: i for i in pathtune.models() if i.backend == "mace"}
    assert known[backend.model_name].available
    assert capsys.readouterr().out == ""


def test_unusable_files_are_refused(paths, tmp_path, load):
    with pytest.raises(PathtuneError, match="--trust-checkpoint"):
        other = tmp_path / "unknown.model"
        other.write_bytes(Path(paths["plain"]).read_bytes() + b"0")
        pathtune.load(str(other))
    with pytest.raises(UsageError, match="unknown model"):
        pathtune.load("absent.model")
    contents = {
        "cannot be read": b"not a pickle",
        "holds a dict": {"state": 1},
        "holds a Linear": torch.nn.Linear(1, 1),
    }
    for message, content in contents.items():
        file = tmp_path / "wrong.model"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(PathtuneError, match=message):
            pathtune.load(str(file), trust_checkpoint=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(file)
    with pytest.raises(PathtuneError, match="compiled"):
        pathtune.load(str(file), trust_checkpoint=True)


def test_heads_are_asked_for(paths):
    for path in paths.values():
        trust.remember(Path(path))
    with pytest.raises(UsageError, match=r"--head pbe\|r2scan\|ccsd"):
        pathtune.load(paths["heads"])
    with pytest.raises(UsageError, match="Did you mean 'r2scan'"):
        pathtune.load(paths["heads"], head="r2scam")
    with pytest.raises(UsageError, match="no heads"):
        pathtune.load(paths["plain"], head="pbe")


FRESH = """
import logging, os, sys
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
before = dict(os.environ)
import pathtune
from pathtune.prediction import predict
from pathtune.properties import Structure
import ase
for _ in range(2):
    backend = pathtune.load({path!r}, device="cpu", trust_checkpoint=True)
    predict(backend, [Structure(ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.2]]))])
pathtune.load({path!r}, device="cpu", dtype="float64", trust_checkpoint=True)
assert list(sys.modules).index("mace") < list(sys.modules).index("e3nn")
backend.calculator({{}}, {{}})
assert dict(os.environ) == before
assert not logging.root.handlers
"""


def test_a_fresh_process_imports_in_order_and_is_left_as_it_was(paths):
    """Once the variable MACE sets is undone, loading must go on working; no output."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH.format(path=paths["plain"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
