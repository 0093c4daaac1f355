"""Random support: as few entries as a sparse run, drawn by lot; the control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from pathtune.methods import base, support

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(base.MethodConfig):
    """Settings of a random support.

    Parameters
    ----------
    lr
        Of the chosen entries.
    max_updated_percent
        Size of the support, in percent of all parameters of the model; where fewer
        entries are selected, all of them.
    """

    lr: float = Field(2e-2, gt=0)
    max_updated_percent: float = Field(3.0, gt=0, le=100)


class Change(support.Change):
    """dW is free on a random support from the first step on, zero at the start."""

    is_zero_at_start: ClassVar[bool] = True

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Draw the support without replacement; set dW = 0."""
        total = sum(t.size for t in self.targets)
        self.own(torch.zeros(total, dtype=dtype))
        self.fix(self.delta, 1 + torch.randperm(total, generator=generator))

    def param_groups(self) -> list[dict[str, Any]]:
        """Return one group."""
        return self.free_groups()
