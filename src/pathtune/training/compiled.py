"""The rewritten model in training: used only after it has proved equal on the data."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pathtune.backends.base import Backend
from pathtune.delta import Delta
from pathtune.errors import PathtuneError
from pathtune.properties import Property

# Of outputs and of gradients, relative to their norm. Terms of a spin layer cancel:
# with one, 1e-5 was seen in single precision; without, 5e-7, and 1e-15 in double.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float64: 1e-10}
# Lone atoms have no forces, so a norm may be zero.
SMALLEST = 1e-3
# Forces are sums of much larger terms; smaller ones (eV/Å, root mean square) are not
# more exact for that.
SMALLEST_FORCES = 0.1


def enable(
    backend: Backend,
    delta: Delta,
    graphs: list[object],
    properties: Collection[Property],
) -> str:
    """Train with the rewritten model from now on; return a line for the log.

    Parameters
    ----------
    backend
        Its `training_model` is set, or left alone where there is no rewritten one.
    delta
        Gradients of its parameters are compared.
    graphs
        Graphs of a few training structures.
    properties
        What is trained.

    Raises
    ------
    PathtuneError
        If outputs or gradients differ from the plain model's by more than rounding.
    """
    rewritten = backend.rewritten()
    if rewritten is None:
        return f"plain ({backend.name} has no rewritten layers)"
    plain = _gradients(backend, delta, graphs, properties)
    backend.training_model = rewritten
    found = _gradients(backend, delta, graphs, properties)
    limit = TOLERANCE[backend.dtype]
    worst = 0.0
    for name, expected in plain.items():
        scale = _scale(name, expected)
        difference = float((found[name] - expected).norm() / scale)
        worst = max(worst, difference)
        if not difference <= limit:
            backend.training_model = None
            raise PathtuneError(
                f"the rewritten layers change {name} by {difference:.1e} (allowed "
                f"{limit:.0e}); train with --no-compile, and please report this"
            )
    return f"rewritten layers, equal to the vendor's to {worst:.0e}"


def _scale(name: str, value: Tensor) -> Tensor:
    """Return the norm that a difference is compared with."""
    smallest = SMALLEST_FORCES * value.numel() ** 0.5 if name == "forces" else SMALLEST
    return value.norm().clamp(min=smallest)


def _gradients(
    backend: Backend,
    delta: Delta,
    graphs: list[object],
    properties: Collection[Property],
) -> dict[str, Tensor]:
    """Return the outputs, and the gradient of the sum of their squares."""
    parameters = list(delta.parameters())
    out = backend.predict(backend.batch(graphs), delta(), properties, training=True)
    finite = {name: value[value.isfinite()] for name, value in out.items()}
    total = torch.stack(
        [
            (value**2).sum() / _scale(name, value.detach())
            for name, value in finite.items()
        ]
    )
    outputs: dict[str, Tensor] = {n: v.detach() for n, v in finite.items()}
    if not parameters:
        return outputs
    gradients = torch.autograd.grad(
        total.sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return {**outputs, "gradient": torch.cat([g.flatten() for g in gradients])}
