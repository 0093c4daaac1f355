"""Full: every selected weight moves freely; the yardstick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pathtune.methods import base

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(base.MethodConfig):
    """Settings of full fine-tuning.

    Parameters
    ----------
    lr, weight_decay
        Of dW; decay pulls the weights back to the foundation model's.
    """

    select: ClassVar[str] = "everything"

    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class Change(base.Change):
    """dW is the parameter itself, zero at the start."""

    is_zero_at_start: ClassVar[bool] = True

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Set dW = 0."""
        total = sum(t.size for t in self.targets)
        self.delta = nn.Parameter(torch.zeros(total, dtype=dtype))

    def forward(self) -> list[Tensor]:
        """Return dW of each target."""
        return self.split(self.delta)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return one group."""
        config = self.config
        return [
            {
                "params": [self.delta],
                "lr": config.lr,
                "weight_decay": config.weight_decay,
            }
        ]
