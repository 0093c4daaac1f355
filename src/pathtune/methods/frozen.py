"""Frozen: no weight changes, reference energies only; what an offset alone gains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pathtune.methods import base

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(base.MethodConfig):
    """There is nothing to set."""


class Change(base.Change):
    """dW = 0; a run does no steps, and its delta holds the shifts."""

    is_zero_at_start: ClassVar[bool] = True
    zero: Tensor

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Keep a zero, which moves to the model's device."""
        self.register_buffer("zero", torch.zeros((), dtype=dtype))

    def forward(self) -> list[Tensor]:
        """Return zeros."""
        return [self.zero.expand(target.size) for target in self.targets]

    def param_groups(self) -> list[dict[str, Any]]:
        """Return no group."""
        return []
