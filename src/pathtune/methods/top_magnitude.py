"""Top magnitude: the largest changes of a dense run, refitted.

The plainest way to choose a support: train everything from dW = 0, keep the entries
that moved furthest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from pathtune.methods import support

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(support.Config):
    """Settings of a fixed support, which here is never without a bound."""

    lr: float = Field(1e-2, gt=0)
    max_updated_percent: float = Field(3.0, gt=0, le=100)


class Change(support.Change):
    """dW is free, zero at the start; then its largest entries are."""

    is_zero_at_start: ClassVar[bool] = True

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Set dW = 0."""
        self.own(torch.zeros(sum(t.size for t in self.targets), dtype=dtype))
