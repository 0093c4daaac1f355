"""The contracts as executable checks, for our tests and for new backends and methods.

Each function raises AssertionError with what is wrong, and returns nothing otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from torch import Tensor

from pathtune import delta as deltas
from pathtune import discovery
from pathtune.backends.base import Backend
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.paths import alive_entries
from pathtune.prediction import predict
from pathtune.properties import Property, Structure
from pathtune.training import optimizer

_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


def _check(claim: bool, message: str) -> None:
    if not claim:
        raise AssertionError(message)


def check_backend(backend: Backend, structures: Sequence[Structure]) -> None:
    """Check a loaded model against the contract of `pathtune.backends.base`.

    Parameters
    ----------
    backend
        A loaded model.
    structures
        A few structures of its elements, at least two, of different sizes.

    Raises
    ------
    AssertionError
        If a parameter is unclassified or classified twice, paths do not tile a weight,
        prediction changes model or input, a batch differs from single structures, or
        the stored weights do not reproduce the model.
    """
    named = dict(backend.model.named_parameters())
    records = backend.path_weights()
    names = [r.name for r in records]
    _check(len(names) == len(set(names)), "a parameter is classified twice")
    _check(set(names) == set(named), "the records are not the model's parameters")
    for record in records:
        _check(record.shape == tuple(named[record.name].shape), f"{record.name}: shape")
        edges = [0, *(p.stop for p in record.paths)]
        starts = [p.start for p in record.paths]
        _check(starts == edges[: len(starts)], f"{record.name}: gaps between paths")
        if record.paths:
            _check(edges[-1] == record.size, f"{record.name}: paths do not cover it")
    _check(not any(p.requires_grad for p in named.values()), "the model is not frozen")

    stored = backend.stored_weights()
    _check(set(stored) == set(named), "stored weights are not the parameters")
    before = {n: t.clone() for n, t in backend.model.state_dict().items()}
    positions = [s.atoms.positions.copy() for s in structures]
    together = predict(backend, structures)
    again = predict(backend, structures, weights=stored, batch_size=1)
    tolerance = _TOLERANCE[backend.dtype]
    for structure, old, one, many in zip(
        structures, positions, again, together, strict=True
    ):
        _check(np.array_equal(structure.atoms.positions, old), "positions changed")
        _check(one["forces"].shape == (structure.n_atoms, 3), "shape of forces")
        for key in one:
            difference = np.abs(np.asarray(one[key]) - many[key]).max()
            scale = structure.n_atoms if key == "energy" else 1
            _check(difference / scale < tolerance, f"batch differs from single: {key}")
    identical = predict(backend, structures, weights=stored)
    for same, many in zip(identical, together, strict=True):
        for key in many:
            _check(np.array_equal(same[key], many[key]), "weights as inputs differ")
    after = backend.model.state_dict()
    for name, tensor in before.items():
        _check(torch.equal(tensor, after[name]), f"predicting changed {name}")
    _check(
        set(backend.reference_energies()) == set(backend.elements),
        "reference energies do not cover the elements",
    )


def check_method(
    backend: Backend, name: str, structure: Structure, *, selection: str | None = None
) -> dict[str, Tensor]:
    """Check a method on a model: start, gradients, steps, merging, counting.

    Parameters
    ----------
    backend
        A loaded model, small.
    name
        Registered name of the method.
    structure
        A structure whose elements are not all of the model's.
    selection
        Which weights; the method's own default without.

    Returns
    -------
    dict
        The merged weights after a few steps in every phase of the method, in the
        stored dtype.

    Raises
    ------
    AssertionError
        If the start is not as declared, anything but alive selected entries moves, the
        merged or reloaded weights differ from the functional ones, or counts are off.
    """
    method = discovery.load("methods", name)
    config = method.Config()
    selection = selection or config.select
    properties: list[Property] = ["energy", "forces"]
    elements = sorted(set(structure.atoms.symbols))
    named = dict(backend.model.named_parameters())
    records = backend.path_weights()
    stored = backend.stored_weights()
    delta = deltas.build(
        records,
        named,
        method=method,
        config=config,
        selection=selection,
        elements=elements,
        head=backend.head,
        seed=0,
        properties=properties,
    )
    starts_at_base = all(torch.equal(w, named[n]) for n, w in delta().items())
    _check(starts_at_base == delta.change.is_zero_at_start, "start is not as declared")

    batch = backend.batch([backend.graph(structure.atoms)])
    base = {n: p.clone() for n, p in named.items()}
    opt = optimizer.build(delta.change.param_groups(), 0)
    _steps(backend, delta, opt, batch, properties)
    phases = 0
    while delta.change.phase_pending:
        opt.eval()
        delta.change.begin_phase()
        _check((phases := phases + 1) < 100, "the phases have no end")
        opt = optimizer.build(delta.change.param_groups(), 0)
        _steps(backend, delta, opt, batch, properties)
    _check(
        all(torch.equal(base[n], p) for n, p in named.items()),
        "a training step changed the foundation model",
    )

    with optimizer.averaged(opt), torch.no_grad():
        functional = delta()
        changes = delta.changes(stored)
    trains = delta.change.trainable > 0
    _check(bool(changes) == trains, "training changed nothing, or without parameters")
    movable = alive_entries(records, selection, elements, backend.head, properties)
    _check(set(functional) <= set(movable), "a weight that is not selected changes")
    for parameter, weight in functional.items():
        moved = torch.nonzero(weight.flatten() != named[parameter].flatten()).flatten()
        only = np.isin(moved.cpu().numpy(), movable[parameter]).all()
        _check(bool(only), f"{parameter}: an entry that cannot be trained moved")
    saved = DeltaFile(changes, {}, {"base": fingerprint(stored)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        saved.save(path)
        reloaded = DeltaFile.load(path)
    merged = reloaded.apply(stored)
    brute = sum(int((merged[n] != stored[n]).sum()) for n in merged)
    _check(brute == reloaded.updated_parameters, "updated entries are miscounted")
    _check_same(backend, structure, functional, merged)
    return merged


def _steps(
    backend: Backend,
    delta: deltas.Delta,
    opt: Any,
    batch: Any,
    properties: Sequence[Property],
    n: int = 3,
) -> None:
    """Do some steps; every trainable tensor has to get a finite gradient."""
    parameters = optimizer.parameters(opt)
    for _ in range(n if parameters else 0):
        opt.zero_grad()
        out = backend.predict(batch, delta(), properties, training=True)
        loss = out["energy"].sum() ** 2 + (out["forces"] ** 2).sum()
        loss.backward(inputs=parameters)
        _check(
            all(p.grad is not None and p.grad.isfinite().all() for p in parameters),
            "a gradient is missing or not finite",
        )
        opt.step()


def _check_same(
    backend: Backend,
    structure: Structure,
    functional: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
) -> None:
    """Check that merged weights are the functional ones, rounded for storing."""
    for name, weight in merged.items():
        rounded = functional[name].cpu().to(weight.dtype)
        _check(torch.equal(rounded, weight), f"{name}: merged is not base + delta")
    a, b = (predict(backend, [structure], weights=w)[0] for w in (functional, merged))
    for name in a:
        difference = np.abs(np.asarray(a[name]) - b[name]).max()
        _check(difference < 1e-4, f"{name}: merged prediction differs")


def symmetry_errors(
    backend: Backend, structure: Structure, weights: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Return how far a model is from its symmetries on one structure.

    Parameters
    ----------
    backend
        A loaded model; float64 for meaningful numbers.
    structure
        Any structure.
    weights
        Parameters in place of the base's, in the stored dtype.

    Returns
    -------
    dict
        ``rotation``, ``translation``, ``permutation`` and, for models that have it,
        ``inversion`` -> (energy error in eV/atom, force error in eV/Å).
    """
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    order = generator.permutation(structure.n_atoms)
    shift = generator.normal(size=3)

    def transformed(matrix: np.ndarray) -> Structure:
        atoms = structure.atoms.copy()
        atoms.set_cell(atoms.cell @ matrix.T)
        atoms.positions = atoms.positions @ matrix.T
        return Structure(atoms)

    moved = structure.atoms.copy()
    moved.positions += shift
    cases = {
        "rotation": (transformed(rotation), lambda f: f @ rotation.T),
        "translation": (Structure(moved), lambda f: f),
        "permutation": (Structure(structure.atoms[order]), lambda f: f[order]),
    }
    if backend.has_inversion:
        cases["inversion"] = (transformed(-np.eye(3)), lambda f: -f)
    reference = predict(backend, [structure], weights=weights)[0]
    errors = {}
    for name, (changed, expected) in cases.items():
        found = predict(backend, [changed], weights=weights)[0]
        energy = abs(float(found["energy"] - reference["energy"])) / structure.n_atoms
        forces = np.abs(found["forces"] - expected(reference["forces"])).max()
        errors[name] = (energy, float(forces))
    return errors


def spin_symmetry_errors(
    backend: Backend, structure: Structure, weights: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return how far a model with a spin layer is from its symmetries.

    Parameters
    ----------
    backend
        A `pathtune.spin.backend.SpinBackend`; float64 for meaningful numbers.
    structure
        With initial moments as vectors, not all in one plane.
    weights
        Of base and layer.

    Returns
    -------
    dict
        ``rotation``, ``inversion`` (moments are axial), ``time reversal`` (moments are
        odd), ``spin rotation`` (of the spins alone), ``permutation`` and
        ``translation`` -> the largest error of any prediction: energy (eV), forces
        (eV/Å), stress (eV/Å^3), moments (μ_B), magnetic forces (eV/μ_B). A model need
        not have all of these: none without inversion in the base, and spin rotation
        without spin-orbit coupling only.
    """
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    rotation *= np.sign(np.linalg.det(rotation))
    order = generator.permutation(structure.n_atoms)
    one, inverted = np.eye(3), -np.eye(3)
    spins = structure.atoms.get_initial_magnetic_moments()

    def transformed(space: np.ndarray, spin: np.ndarray) -> Structure:
        atoms = structure.atoms.copy()
        atoms.set_cell(atoms.cell @ space.T)
        atoms.positions = atoms.positions @ space.T
        atoms.set_initial_magnetic_moments(spins @ spin.T)
        return Structure(atoms)

    moved = structure.atoms.copy()
    moved.positions += generator.normal(size=3)
    everyone = np.arange(structure.n_atoms)
    # The changed structure, and what polar vectors, axial ones and the order become.
    cases = {
        "rotation": (transformed(rotation, rotation), rotation, rotation, everyone),
        "inversion": (transformed(inverted, one), inverted, one, everyone),
        "time reversal": (transformed(one, -one), one, -one, everyone),
        "spin rotation": (transformed(one, rotation), one, rotation, everyone),
        "permutation": (Structure(structure.atoms[order]), one, one, order),
        "translation": (Structure(moved), one, one, everyone),
    }
    reference = predict(backend, [structure], weights=weights)[0]
    errors = {}
    for name, (changed, space, spin, rows) in cases.items():
        found = predict(backend, [changed], weights=weights)[0]
        expected = {"energy": reference["energy"]}
        expected["forces"] = reference["forces"][rows] @ space.T
        if "stress" in reference:
            stress = space @ voigt_6_to_full_3x3_stress(reference["stress"]) @ space.T
            expected["stress"] = full_3x3_to_voigt_6_stress(stress)
        moments = reference["magmoms"][rows]
        expected["magmoms"] = moments @ spin.T if moments.ndim == 2 else moments
        if "magforces" in reference:
            expected["magforces"] = reference["magforces"][rows] @ spin.T
        errors[name] = max(
            float(np.abs(found[key] - value).max())  # type: ignore[index]
            for key, value in expected.items()
        )
    return errors
