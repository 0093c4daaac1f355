"""Gradual: the support shrinks in stages, and the rest learns to do without.

dW starts at zero and is dense. At each stage the smallest entries are set to zero for
good and the others go on, so that they take over what was cut; the number that stays
follows the cubic schedule of gradual magnitude pruning. All times are shares of the
run and nothing is random, so the result does not depend on the number of steps or on a
draw of initial noise.

References
----------
Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878 (2017), eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pathtune.methods import support

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(support.Config):
    """Settings of a shrinking support.

    Parameters
    ----------
    lr
        Learning rate while everything is trained; a stage with a share p of the
        entries left has lr / √p, since few weights need larger steps.
    stages
        How often the support shrinks.
    first_stage
        Share of the steps before it shrinks first.
    """

    lr: float = Field(1e-2, gt=0)
    max_updated_percent: float = Field(3.0, gt=0, le=100)
    stages: int = Field(6, ge=1)
    first_stage: float = Field(0.1, gt=0, lt=1)


class Change(support.Change):
    """dW on a support that shrinks to the bound."""

    is_zero_at_start: ClassVar[bool] = True
    stage: Tensor

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Set dW = 0."""
        self.own(torch.zeros(sum(t.size for t in self.targets), dtype=dtype))
        self.register_buffer("stage", torch.tensor(0))

    def _left(self, stage: int) -> int:
        """Return how many entries are left after a stage; all after stage 0."""
        return support.left(len(self.support), self._budget, stage / self.config.stages)

    @property
    def _times(self) -> list[float]:
        """The shares of the steps at which the support shrinks."""
        first, last = self.config.first_stage, 1 - self.config.refit_fraction
        n = self.config.stages
        if n == 1:
            return [last]
        return [first + (last - first) * i / (n - 1) for i in range(n)]

    @property
    def phase_share(self) -> float:
        """The share of the steps that this stage takes."""
        edges = [0.0, *self._times, 1.0]
        return edges[int(self.stage) + 1] - edges[int(self.stage)]

    @property
    def phase_pending(self) -> bool:
        """Whether the support is still to shrink."""
        return int(self.stage) < self.config.stages

    def phase_due(self, progress: float) -> bool:
        """Whether the next stage begins now."""
        return self.phase_pending and progress >= self._times[int(self.stage)]

    @torch.no_grad()
    def begin_phase(self) -> None:
        """Keep the largest entries of dW, as many as the schedule says."""
        self.stage += 1
        current = torch.cat(self())
        self.fix(current, current.abs(), self._left(int(self.stage)))
