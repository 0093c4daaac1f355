"""Least squares for a part of the spin layer, before it is trained.

Couplings that depend on the distance alone, and an energy of the moments' lengths, make
a classical spin model. Energies, forces, stresses and magnetic forces are linear in its
few coefficients, which are fitted by ridge regression to what the base leaves of the
labels. Magnetic energies are some meV per atom, and the terms that decide about them
are nearly collinear: gradient descent from zero needs thousands of steps for what the
normal equations give at once. With ``directions`` the lengths of the moments are
fitted first, in the same way.

What reads the features of the base is left to the training: its slopes are costly to
tabulate, and it would explain whatever else the base gets wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.func import functional_call, grad, vmap

from pathtune.backends.base import Features
from pathtune.properties import Property
from pathtune.spin.backend import PREFIX, SpinBackend
from pathtune.spin.config import SpinConfig
from pathtune.spin.layer import SpinLayer
from pathtune.training import distributed
from pathtune.training.data import Frames
from pathtune.training.loss import Labels

MOMENTS = ("length.2.weight", "length.2.bias", "mixing.weight", "mixing.bias")
ENERGIES = ("distances.weight", "distances.bias", "site.2.bias")
#: Frames that are used; some ten numbers are fitted to them.
MOST_FRAMES = 200
_FOLDS = 5
# Of columns of length one, the largest first: coefficients that cancel each other are
# worth neither a last per cent nor what other frames would undo.
_RIDGES = np.logspace(0, -8, 9).tolist()
_NEARLY = 0.02
# Columns computed together, times the number of pairs.
_AT_ONCE = 500_000

_Values = dict[Property, Tensor]


def fit(
    backend: SpinBackend,
    frames: Frames,
    properties: Collection[Property],
    console: Console,
) -> dict[str, Tensor]:
    """Return the layer's parameters with the classical spin model fitted.

    What is minimised is the share of the labels' sum of squares that stays unexplained,
    added over the properties; energies count per atom. The ridge is the largest whose
    error on fifths of the frames, left out in turn, exceeds the lowest by no more than
    2 % and the standard error of the difference. A fifth is a block of successive
    frames: neighbours in a file are often steps of one calculation.

    Parameters
    ----------
    backend
        Its layer's parameters are the initial ones.
    frames
        Training frames, reference energies subtracted; at most `MOST_FRAMES` of them,
        evenly spread, are used.
    properties
        What is trained.
    console
        Where progress is shown.

    Returns
    -------
    dict
        As `SpinBackend.spin_parameters`.
    """
    parameters = {
        name.removeprefix(PREFIX): value
        for name, value in backend.spin_parameters().items()
    }
    for names, learned in _stages(backend.config, properties):
        held = {name: parameters[name] for name in names if name in parameters}
        grams = _grams(backend, frames, parameters, held, learned, console)
        solution = solve(torch.stack(distributed.gather(grams)).sum(0))
        parameters |= _unpack(solution.to(backend.device, backend.dtype), held)
    return {PREFIX + name: value for name, value in parameters.items()}


def _stages(
    config: SpinConfig, properties: Collection[Property]
) -> Iterator[tuple[Sequence[str], list[Property]]]:
    """Yield the names of parameters, and the labels they are fitted to."""
    if config.spins == "directions" and "magmoms" in properties:
        yield MOMENTS, ["magmoms"]
    learned: list[Property] = [name for name in properties if name != "magmoms"]
    if config.spins != "none" and learned:
        yield ENERGIES, learned


def _grams(
    backend: SpinBackend,
    frames: Frames,
    parameters: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    learned: Sequence[Property],
    console: Console,
) -> Tensor:
    """Return the products of all columns and the targets, the last column.

    Returns
    -------
    Tensor
        (n_properties, n_folds, n_coefficients + 1, n_coefficients + 1), float64, over
        this process's share of the frames.
    """
    n = len(frames)
    rows = np.unique(np.linspace(0, n - 1, min(n, MOST_FRAMES)).astype(int)).tolist()
    share = range(len(rows))[distributed.rank() :: distributed.size()]
    width = sum(value.numel() for value in held.values()) + 1
    grams = torch.zeros(len(learned), _FOLDS, width, width, dtype=torch.float64)
    steps = frames.load([[rows[i]]] for i in share)
    shown = track(
        zip(share, steps, strict=True),
        total=len(share),
        description="fitting the spin layer",
        console=console,
        transient=True,
    )
    for place, (part,) in shown:
        batch = backend.batch(part.graphs)
        features = backend.base.features(batch.base, {})
        (slopes,) = torch.autograd.grad(
            features.energy.sum(), features.leaf, materialize_grads=True
        )
        features = features.detached()
        columns, start = _columns(
            backend.layer, parameters, held, features, slopes, batch.spins, learned
        )
        labels = part.labels.to(backend.device, backend.dtype)
        targets = _targets(labels, start)
        fold = place * _FOLDS // len(rows)
        for gram, name in zip(grams[:, fold], learned, strict=True):
            difference, weight = targets[name]
            table = torch.cat([columns[name], difference.unsqueeze(0)]).flatten(1)
            weight = weight.view(-1, *[1] * (difference.dim() - 1))
            known = (weight > 0).expand_as(difference).flatten()
            table = (weight.sqrt() * table.view(-1, *difference.shape)).flatten(1)
            table = table[:, known].double()
            gram += (table @ table.T).cpu()
    return grams


def _columns(
    layer: SpinLayer,
    parameters: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    features: Features,
    base_slopes: Tensor,
    spins: Tensor,
    learned: Sequence[Property],
) -> tuple[_Values, _Values]:
    """Return what each coefficient adds to the predictions, and these without any."""

    def predict(coefficients: Tensor) -> _Values:
        values = {**parameters, **_unpack(coefficients, held)}
        if learned == ["magmoms"]:
            out = functional_call(layer, values, (features, spins))
            return {"magmoms": out.moments}

        def energy(vectors: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            moved = replace(features, vectors=vectors)
            energies = functional_call(layer, values, (moved, x)).energy
            return energies.sum(), energies

        slopes, energies = grad(energy, argnums=(0, 1), has_aux=True)(
            features.vectors, spins
        )
        forces, stress = features.forces_and_stress(base_slopes + slopes[0])
        predicted: _Values = {
            "energy": features.energy + energies,
            "forces": forces,
            "stress": stress,
            "magforces": -slopes[1],
        }
        return {name: predicted[name] for name in learned}

    n = sum(value.numel() for value in held.values())
    start = predict(spins.new_zeros(n))
    one_by_one = torch.eye(n, dtype=spins.dtype, device=spins.device)
    chunk = max(1, _AT_ONCE // max(1, features.pairs.shape[1]))
    ends: _Values = vmap(predict, chunk_size=chunk)(one_by_one)
    return {name: ends[name] - start[name] for name in learned}, start


def _targets(labels: Labels, start: _Values) -> dict[Property, tuple[Tensor, Tensor]]:
    """Return what is left to explain of the labels, and their weights."""
    found = {}
    for name, value in start.items():
        weight = getattr(labels, f"{name}_weight")
        if name == "energy":
            weight = weight / labels.n_atoms**2
        found[name] = getattr(labels, name) - value, weight
    return found


def solve(grams: Tensor) -> Tensor:
    """Return the coefficients of the ridge regression, (n_coefficients,) float64.

    Parameters
    ----------
    grams
        (n_properties, n_folds, n_coefficients + 1, n_coefficients + 1), products of
        the columns and, last, of the targets.
    """
    squares = grams[:, :, -1, -1].sum(1)
    known = squares > 0
    folds = (grams[known] / squares[known, None, None, None]).sum(0)
    lengths = folds.sum(0).diagonal().sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    lengths[-1] = 1
    folds = folds / lengths / lengths.unsqueeze(1)
    total = folds.sum(0)

    def coefficients(gram: Tensor, ridge: float) -> Tensor:
        eye = torch.eye(len(gram) - 1, dtype=gram.dtype)
        return torch.linalg.solve(gram[:-1, :-1] + ridge * eye, gram[:-1, -1])

    def unexplained(ridge: float) -> Tensor:
        errors = []
        for fold in folds:
            signs = torch.cat([coefficients(total - fold, ridge), -fold.new_ones(1)])
            errors.append(signs @ fold @ signs)
        return torch.stack(errors)

    errors = {ridge: unexplained(ridge) for ridge in _RIDGES}
    lowest = min(errors.values(), key=lambda error: float(error.sum()))

    def is_nearly_lowest(error: Tensor) -> bool:
        excess = error - lowest
        standard_error = excess.std() / _FOLDS**0.5
        return bool(excess.mean() <= _NEARLY * lowest.mean() + standard_error)

    chosen = next(r for r, error in errors.items() if is_nearly_lowest(error))
    return coefficients(total, chosen) / lengths[:-1]


def _unpack(values: Tensor, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a vector of numbers in the shapes of the parameters it stands for."""
    parts = values.split([value.numel() for value in held.values()])
    return {
        name: part.view(value.shape)
        for part, (name, value) in zip(parts, held.items(), strict=True)
    }
