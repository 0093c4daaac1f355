"""The contract of every registered backend, on a pre-trained model of its family."""

from __future__ import annotations

import os
import random
import warnings

import ase.build
import ase.io
import numpy as np
import pytest
import torch

import pathtune
from pathtune import discovery, trust
from pathtune.config import RunConfig
from pathtune.deltafile import DeltaFile
from pathtune.errors import UsageError
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.testing import check_backend, symmetry_errors
from tests.backends.families import FAMILIES

# Of symmetry errors, eV/atom; ten times as much in eV/Å.
LIMIT = {"float32": 1e-5, "float64": 1e-8}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=getattr(pytest.mark, name))
        for name in discovery.names("backends")
    ],
)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def load(family):
    """Load a model of the family, each precision once."""
    loaded = {}

    def load(model=family.model, dtype="float32"):
        if (model, dtype) not in loaded:
            loaded[model, dtype] = pathtune.load(
                model, dtype=dtype, device="cpu", trust_checkpoint=True
            )
        return loaded[model, dtype]

    return load


@pytest.fixture(scope="module")
def base(load):
    return load()


def crystals() -> list[ase.Atoms]:
    oxide = ase.build.bulk("NiO", "rocksalt", a=4.2)
    copper = ase.build.bulk("Cu", cubic=True)
    copper.set_cell(copper.cell * 1.02, scale_atoms=True)
    for seed, atoms in enumerate((oxide, copper)):
        atoms.rattle(0.05, seed=seed)
    return [oxide, copper, ase.build.bulk("Fe")]


def samples(family) -> list[Structure]:
    frames = crystals()
    if family.predicts_molecules:
        water = ase.build.molecule("H2O")
        water.rattle(0.05, seed=3)
        frames.append(water)
    return [Structure(atoms) for atoms in frames]


@pytest.fixture(scope="module")
def tuned(family, base, tmp_path_factory):
    """A delta after 20 steps on NiO labelled with shifted energies, and its errors."""
    folder = tmp_path_factory.mktemp("tuned")
    frames = []
    for index in range(8):
        atoms = ase.build.bulk("NiO", "rocksalt", a=4.2, cubic=True)[:6]
        atoms.rattle(0.08, seed=index)
        frames.append(atoms)
    labels = predict(base, [Structure(atoms) for atoms in frames])
    for index, (atoms, label) in enumerate(zip(frames, labels, strict=True)):
        # Another level of theory: softer forces, other reference energies.
        stretched = 0.8 * label["energy"] + 0.1 * index % 3
        atoms.info["REF_energy"] = float(stretched) - 700.0
        atoms.info["REF_stress"] = 0.8 * label["stress"]
        atoms.arrays["REF_forces"] = 0.8 * label["forces"]
    ase.io.write(folder / "train.xyz", frames[:6])
    ase.io.write(folder / "valid.xyz", frames[6:])
    trust_if_file(family)
    config = RunConfig(
        model=family.model,
        train=str(folder / "train.xyz"),
        valid=str(folder / "valid.xyz"),
        output=str(folder / "run"),
        method="full",
        max_steps=20,
        eval_every=10,
        device="cpu",
    )
    results = pathtune.finetune(config)
    return DeltaFile.load(folder / "run" / "delta.safetensors"), results


def trust_if_file(family) -> None:
    if os.path.exists(family.model):
        trust.remember(family.model)


@pytest.fixture(scope="module")
def merged(family, base, tuned, tmp_path_factory):
    path = tmp_path_factory.mktemp("merged") / f"merged{family.suffix}"
    pathtune.merge(base, tuned[0], path)
    return str(path)


def assert_same(calculator, structures, expected, noise) -> None:
    """To 1e-6 eV/atom and `noise` eV/Å, and what float32 rounds of total energies."""
    for structure, ours in zip(structures, expected, strict=True):
        atoms = structure.atoms.copy()
        atoms.calc = calculator
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the vendor's own
            energy = atoms.get_potential_energy()
        n = len(atoms)
        assert abs(ours["energy"] - energy) / n < 1e-6 + 4 * abs(energy) * 2**-24 / n
        assert np.abs(ours["forces"] - atoms.get_forces()).max() < noise
        if atoms.cell.rank == 3:
            assert np.abs(ours["stress"] - atoms.get_stress()).max() < 1e-6


def test_contract(base, family):
    check_backend(base, samples(family))


def test_prediction_is_the_vendors_calculator(base, family):
    structures = samples(family)
    vendor = family.calculator(family.model)
    found = predict(base, structures, batch_size=1)
    assert_same(vendor, structures, found, family.noise)


def test_twenty_steps_lower_the_error(tuned):
    _, results = tuned
    before, after = results["zero_shot"], results["valid"]
    for key in ("forces_mae_mev_per_angstrom", "stress_mae_mev_per_angstrom3"):
        assert after[key] < before[key]
    assert results["sparsity"]["updated_parameters"] > 0


def test_without_the_delta_the_base_is_back_bit_for_bit(base, tuned):
    stored = base.stored_weights()
    merged = {**stored, **tuned[0].apply(stored)}
    restored = tuned[0].remove(merged)
    assert any(not torch.equal(merged[name], stored[name]) for name in stored)
    for name, tensor in stored.items():
        assert torch.equal(tensor.view(torch.uint8), restored[name].view(torch.uint8))


def test_merged_file_in_the_vendors_calculator(base, tuned, merged, family):
    delta, structures = tuned[0], samples(family)
    weights = delta.apply(base.stored_weights())
    ours = predict(base, structures, weights=weights, shifts=delta.shifts, batch_size=1)
    assert_same(family.calculator(merged), structures, ours, family.noise)
    assert_same(pathtune.calculator(base, delta), structures, ours, family.noise)


def test_no_element_is_dropped_and_absent_ones_stay_bit_identical(
    base, tuned, merged, load
):
    reloaded = load(merged)
    assert reloaded.elements == base.elements
    before, after = base.stored_weights(), reloaded.stored_weights()
    assert before.keys() == after.keys()
    dead = moved = 0
    for weight in base.path_weights():
        old, new = before[weight.name].flatten(), after[weight.name].flatten()
        alive = torch.from_numpy(weight.alive({"Ni", "O"}, base.head))
        if weight.kind == "scale_shift":
            continue  # reference energies, below
        assert torch.equal(old[~alive], new[~alive]), weight.name
        dead += int((~alive).sum())
        moved += int((old != new).sum())
    assert moved == tuned[0].updated_parameters
    assert dead > 0 or not any(w.elements for w in base.path_weights())
    energies = base.reference_energies(), reloaded.reference_energies()
    for symbol in base.elements:
        shift = tuned[0].shifts.get(symbol, 0.0)
        expected = energies[0][symbol] + shift
        assert energies[1][symbol] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        if symbol not in tuned[0].shifts:
            assert energies[1][symbol] == energies[0][symbol]


def test_symmetry_of_base_tuned_and_merged(base, tuned, merged, load, family):
    dtype, limit = family.precision, LIMIT[family.precision]
    backend = load(dtype=dtype)
    weights = tuned[0].apply(base.stored_weights())
    for model, changed in (
        (backend, {}),
        (backend, weights),
        (load(merged, dtype), {}),
    ):
        for structure in samples(family):
            found = symmetry_errors(model, structure, changed)
            assert {"rotation", "translation", "permutation"} <= set(found)
            for name, (energy, forces) in found.items():
                assert energy < limit, name
                assert forces < 10 * limit, name


def test_symmetry_control_must_fail(load, family):
    """The same test notices a layer that treats components differently."""
    backend = load(dtype=family.precision)
    with family.broken(backend):
        energy, forces = symmetry_errors(backend, samples(family)[0], {})["rotation"]
    limit = LIMIT[family.precision]
    assert energy > 10 * limit or forces > 100 * limit


def test_rewritten_layers_give_the_same_gradients(load, family):
    """Ten batches of different sizes, a lone atom and padded rows among them."""
    backend = load(dtype=family.precision)
    rewritten = backend.rewritten()
    if rewritten is None:
        pytest.skip("this family has no rewritten layers")
    named = dict(backend.model.named_parameters())
    assert {n: p.shape for n, p in rewritten.named_parameters()} == {
        n: p.shape for n, p in named.items()
    }
    frames = [s.atoms for s in samples(family)]
    frames.append(frames[0].repeat((1, 2, 1)))
    frames.append(ase.Atoms("Ni", cell=[20, 20, 20], pbc=True))
    for index, atoms in enumerate(frames):
        atoms.rattle(0.03, seed=index)
    graphs = [backend.graph(atoms) for atoms in frames]
    generator = np.random.default_rng(0)

    def gradient(batch, model):
        backend.training_model = model
        weights = {n: p.clone().requires_grad_() for n, p in named.items()}
        out = backend.predict(batch, weights, ["energy", "forces"], training=True)
        loss = out["energy"].pow(2).sum() + out["forces"].pow(2).sum()
        parts = torch.autograd.grad(
            loss, list(weights.values()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([out["forces"].detach().flatten(), *map(torch.ravel, parts)])

    limit = {"float32": 1e-5, "float64": 1e-10}[family.precision]
    try:
        for size in range(1, 11):
            chosen = generator.choice(
                len(graphs), min(size, len(graphs)), replace=False
            )
            batch = backend.batch([graphs[i] for i in chosen])
            plain, other = (gradient(batch, model) for model in (None, rewritten))
            assert float((plain - other).norm()) <= limit * float(plain.norm())
    finally:
        backend.training_model = None


def test_a_missing_precision_is_refused(load, family):
    if family.precision == "float64":
        assert load(dtype="float64").dtype == torch.float64
    else:
        with pytest.raises(UsageError, match="float32"):
            load(dtype="float64")


def test_the_process_is_found_as_it_was(family, tuned, tmp_path):
    before = (
        torch.get_default_dtype(),
        torch.get_rng_state().clone(),
        np.random.get_state()[1].copy(),
        random.getstate(),
        dict(os.environ),
        list(warnings.filters),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
    )
    trust_if_file(family)
    backend = pathtune.load(family.model, device="cpu")
    predict(backend, samples(family))
    pathtune.merge(backend, tuned[0], tmp_path / f"m{family.suffix}")
    pathtune.calculator(backend, tuned[0])
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert random.getstate() == before[3]
    assert dict(os.environ) == before[4]
    assert list(warnings.filters) == before[5]
    assert torch.are_deterministic_algorithms_enabled() == before[6]
    assert torch.backends.cuda.matmul.allow_tf32 == before[7]
