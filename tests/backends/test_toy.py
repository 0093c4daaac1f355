"""The worked example of docs/extending.md: one file makes a family complete."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pathtune
from pathtune import backends, discovery
from pathtune.backends.base import undisturbed
from pathtune.config import RunConfig
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.testing import check_backend, symmetry_errors
from tests.conftest import ROOT, crystals, molecules

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("e3nn") is None, reason="needs e3nn"
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Put the file of the docs beside the backends; return its module."""
    if importlib.util.find_spec("mace"):
        with undisturbed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mace  # noqa: F401, e3nn 0.4.4 can only be imported after it
            from e3nn import nn, o3  # noqa: F401
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (text,) = (block for block in blocks if block.startswith('"""Toy'))
    folder = tmp_path / "backends"
    folder.mkdir()
    (folder / "toy.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(folder)])
    yield discovery.load("backends", "toy")
    del sys.modules["pathtune.backends.toy"]
    del backends.toy


@pytest.fixture
def model(toy, tmp_path):
    """Write a toy of random weights; return its path."""
    elements = ("H", "C", "O", "Cu")
    torch.manual_seed(0)
    weights = {n: p.detach() for n, p in toy.Toy(elements).named_parameters()}
    path = tmp_path / "random.toy"
    save_file(weights, path, {"elements": " ".join(elements)})
    return str(path)


def samples() -> list[Structure]:
    return [Structure(atoms) for atoms in (*molecules(1), *crystals(2))]


def test_contract(model):
    check_backend(pathtune.load(model, device="cpu"), samples())


def test_symmetry(model):
    backend = pathtune.load(model, device="cpu", dtype="float64")
    for structure in samples():
        for energy, forces in symmetry_errors(backend, structure, {}).values():
            assert energy < 1e-12
            assert forces < 1e-10


def test_stress_is_a_derivative(model):
    backend = pathtune.load(model, device="cpu", dtype="float64")
    atoms, step = samples()[1].atoms, 1e-5
    strained = [atoms.copy(), atoms.copy()]
    for sign, copy in zip((1, -1), strained, strict=True):
        strain = np.eye(3)
        strain[0, 2] = strain[2, 0] = sign * step / 2
        copy.set_cell(copy.cell @ strain, scale_atoms=True)
    plus, minus = (
        p["energy"] for p in predict(backend, [Structure(a) for a in strained])
    )
    stress = predict(backend, samples())[1]["stress"]
    numeric = (plus - minus) / (2 * step * atoms.get_volume())
    assert stress[4] == pytest.approx(numeric, abs=1e-8)


def test_tune_and_merge(model, tmp_path):
    for name, seed in (("train", 0), ("valid", 1)):
        ase.io.write(tmp_path / f"{name}.xyz", molecules(4, seed))
    config = RunConfig(
        model=model,
        train=str(tmp_path / "train.xyz"),
        valid=str(tmp_path / "valid.xyz"),
        output=str(tmp_path / "run"),
        max_steps=40,
        lr=0.05,
    )
    results = pathtune.finetune(config)
    before, after = results["zero_shot"], results["valid"]
    key = "forces_mae_mev_per_angstrom"
    assert after[key] < before[key]
    delta, merged = tmp_path / "run" / "delta.safetensors", tmp_path / "merged.toy"
    pathtune.merge(model, delta, merged)
    # Copper was not in the data: its rows are what they were.
    base, tuned = pathtune.load(model), pathtune.load(str(merged))
    for weight in base.path_weights():
        dead = ~torch.from_numpy(weight.alive({"H", "C", "O"}, None))
        old, new = (b.stored_weights()[weight.name].flatten() for b in (base, tuned))
        assert torch.equal(old[dead], new[dead])
    atoms = ase.build.molecule("CH3OH")
    atoms.calc = pathtune.calculator(model, delta)
    energy = predict(tuned, [Structure(atoms)])[0]["energy"]
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-4)
