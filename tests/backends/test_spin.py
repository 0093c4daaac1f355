"""Spin layers on the families that expose node features."""

from __future__ import annotations

import ase.build
import numpy as np
import pytest
import torch

import pathtune
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.spin.backend import SpinBackend, split_weights
from pathtune.spin.config import SpinConfig
from pathtune.testing import spin_symmetry_errors
from tests.backends.families import FAMILIES

EXPOSING = ("mace", "nequip", "sevennet")
CONFIG = SpinConfig(spin_orbit=True, width=16)


def samples() -> list[Structure]:
    """A rattled oxide and a molecule, with vector spins."""
    crystal = ase.build.bulk("CuO", "rocksalt", a=4.2, cubic=True)
    crystal.rattle(0.08, seed=1)
    frames = [crystal, ase.build.molecule("CH3OH")]
    generator = np.random.default_rng(0)
    for atoms in frames:
        spins = generator.normal(size=(len(atoms), 3))
        spins[atoms.numbers == 8] = 0
        atoms.set_initial_magnetic_moments(spins)
    return [Structure(atoms) for atoms in frames]


def shaken(backend: SpinBackend) -> dict[str, torch.Tensor]:
    """Parameters of base and layer away from where they start."""
    generator = torch.Generator().manual_seed(1)

    def moved(p, scale):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        return p.double() + scale * noise

    weights = {n: moved(p, 0.01) for n, p in backend.stored_weights().items()}
    layer = {n: moved(p, 0.05) for n, p in backend.spin_parameters().items()}
    return {n: w.to(backend.dtype) for n, w in (weights | layer).items()}


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=getattr(pytest.mark, n)) for n in EXPOSING],
)
def base(request):
    model = FAMILIES[request.param].model
    if request.param == "sevennet":  # the released one does not know inversion
        model = str(request.getfixturevalue("tiny_sevennet"))
    return pathtune.load(model, device="cpu", dtype="float64", trust_checkpoint=True)


def test_features_are_those_of_the_prediction(base):
    weights, _ = split_weights(shaken(SpinBackend(base, CONFIG)))
    batch = base.batch([base.graph(s.atoms) for s in samples()])
    expected = base.predict(batch, weights, {"energy", "forces", "stress"})
    features = base.features(batch, weights)
    (slopes,) = torch.autograd.grad(features.energy.sum(), features.leaf)
    forces, stress = features.forces_and_stress(slopes)
    assert torch.allclose(features.energy, expected["energy"], atol=1e-10)
    assert torch.allclose(forces, expected["forces"], atol=1e-10)
    assert torch.allclose(stress[0], expected["stress"][0], atol=1e-10)
    assert len(features.scalars) == len(features.structure) == len(forces)
    assert features.vectors.norm(dim=1).max() <= base.r_max


def test_the_start_is_the_base(base):
    backend = SpinBackend(base, CONFIG)
    frames = samples()
    plain, spun = predict(base, frames), predict(backend, frames)
    for one, other, frame in zip(plain, spun, frames, strict=True):
        for name in one:
            assert np.allclose(one[name], other[name], atol=1e-10)
        spins = frame.atoms.get_initial_magnetic_moments()
        assert np.array_equal(other["magmoms"], spins)
        assert not other["magforces"].any()


def test_symmetry(base):
    backend = SpinBackend(base, CONFIG)
    frame = samples()[0]
    found = spin_symmetry_errors(backend, frame, shaken(backend))
    assert found.pop("spin rotation") > 1e-3
    if not base.has_inversion:
        del found["inversion"]
    assert max(found.values()) < 1e-8


def test_forces_are_derivatives(base):
    backend = SpinBackend(base, CONFIG)
    weights, step = shaken(backend), 1e-4
    atoms = samples()[0].atoms
    found = predict(backend, [Structure(atoms)], weights=weights)[0]
    base_forces = predict(base, [Structure(atoms)])[0]["forces"]
    assert np.abs(found["forces"] - base_forces).max() > 0.01
    for array, name in (("positions", "forces"), ("initial_magmoms", "magforces")):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.arrays[array][2, 1] += sign * step
            energies.append(predict(backend, [Structure(moved)], weights=weights)[0])
        plus, minus = (float(p["energy"]) for p in energies)
        force = found[name][2, 1]
        scale = np.abs(found[name]).max()
        assert (minus - plus) / (2 * step) == pytest.approx(force, abs=1e-5 * scale)


def test_rewritten_layers_train_the_same(base):
    backend = SpinBackend(base, CONFIG)
    weights = {n: w.requires_grad_() for n, w in shaken(backend).items()}
    batch = backend.batch([backend.graph(s.atoms) for s in samples()])
    rewritten = backend.rewritten()
    assert rewritten is not None

    def gradients():
        out = backend.predict(batch, weights, backend.properties, training=True)
        loss = torch.stack([(v[v.isfinite()] ** 2).mean() for v in out.values()]).sum()
        found = torch.autograd.grad(
            loss, list(weights.values()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in found])

    plain = gradients()
    backend.training_model = rewritten
    found = gradients()
    backend.training_model = None
    assert (found - plain).norm() < 1e-9 * plain.norm()
    assert plain.isfinite().all()


def test_saving_leaves_the_layer_out(base, tmp_path):
    backend = SpinBackend(base, CONFIG)
    path = tmp_path / f"merged{FAMILIES[base.name].suffix}"
    weights = {n: w.float() for n, w in shaken(backend).items()}
    backend.save(path, weights, {})
    pathtune.trust.remember(path)
    again = backend.reload(path)
    assert isinstance(again, SpinBackend)
    for name, weight in again.stored_weights().items():
        assert torch.equal(weight, weights[name].to(weight.dtype))
