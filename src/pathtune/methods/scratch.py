"""Scratch: the architecture without its pre-training; what the base is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pathtune.methods import base, full

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(base.MethodConfig):
    """Settings of training from scratch.

    Parameters
    ----------
    lr
        Of all weights.
    """

    select: ClassVar[str] = "everything"
    #: Decay of dW would pull towards the pre-trained weights.
    weight_decay: ClassVar[float] = 0.0

    lr: float = Field(1e-2, gt=0)


def initial_std(target: base.Target) -> float | None:
    """Return the width of the distribution a weight is drawn from, None to keep it.

    1 for the layers of e3nn, whose normalisation is in the couplings; 1 / n_couplings
    for symmetric contractions, as MACE draws them. Other matrices (radial networks,
    layers of PyTorch) keep the root mean square of the pre-trained entries, for how a
    vendor normalises them is not known here. What is no matrix is not random in a new
    model either: frequencies of radial functions, biases, scales and shifts.
    """
    weight = target.weight
    if not weight.is_matrix or weight.kind == "scale_shift":
        return None
    if weight.kind == "contraction":
        return 1 / weight.shape[-2]
    return 1.0 if weight.is_flat else float(target.base.double().square().mean().sqrt())


class Change(full.Change):
    """dW = W_new - W at the start, W_new drawn afresh; then it moves freely.

    Entries of elements that are absent from the data stay the foundation model's.
    """

    is_zero_at_start: ClassVar[bool] = False

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Draw W_new ~ N(0, σ²) with σ of `initial_std`."""

        def start(target: base.Target) -> Tensor:
            if (std := initial_std(target)) is None:
                return torch.zeros(target.size, dtype=torch.float64)
            drawn = torch.randn(target.size, generator=generator, dtype=torch.float64)
            return std * drawn - target.base.double()

        self.delta = nn.Parameter(torch.cat([*map(start, self.targets)]).to(dtype))
