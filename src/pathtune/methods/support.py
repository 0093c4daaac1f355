"""A fixed support: dW moves freely on some entries and is zero on the others.

What `sparse` with a bound, `top_magnitude` and `random_support` have in common; no
method by itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pathtune.errors import UsageError
from pathtune.methods import base


class Config(base.MethodConfig):
    """Settings of a method that may choose a support and refit it.

    Parameters
    ----------
    lr
        Learning rate of dW until the support is fixed.
    max_updated_percent
        Upper bound on the updated share of all parameters of the model, in percent.
        With a bound the run has two phases: the first shows which entries matter, then
        those (at most this many, the largest first) are refitted and all others are
        zero. None: one phase.
    refit_fraction
        Share of the steps spent on the second phase.
    refit_lr
        Learning rate of the second phase. Few weights need larger steps: None is
        lr / √p where a share p of the entries is left.
    """

    lr: float = Field(gt=0)
    max_updated_percent: float | None = Field(None, gt=0, le=100)
    refit_fraction: float = Field(0.4, gt=0, lt=1)
    refit_lr: float | None = Field(None, gt=0)


class Change(base.Change):
    """dW = `free` at first, then the parameter on a fixed support."""

    support: Tensor
    is_fixed: Tensor

    def own(self, start: Tensor) -> None:
        """Create the parameter ``delta``, shape (entries of all targets,).

        Call it in `initialise`.

        Raises
        ------
        UsageError
            If the bound leaves no entry.
        """
        percent, total = self.config.max_updated_percent, self.total_parameters
        self._budget = total if percent is None else int(percent / 100 * total)
        if self._budget == 0:
            raise UsageError(
                f"max_updated_percent = {percent} of {total} parameters is not one "
                f"entry; one is {100 / total:.2g} %"
            )
        self.delta = nn.Parameter(start)
        #: Entries that may differ from zero once the support is fixed.
        self.register_buffer("support", torch.zeros(len(start), dtype=torch.bool))
        self.register_buffer("is_fixed", torch.tensor(False))

    @torch.no_grad()
    def fix(self, start: Tensor, scores: Tensor, budget: int | None = None) -> None:
        """Fix the support: the highest positive scores, at most up to the bound.

        Parameters
        ----------
        start
            dW to go on from, shape (entries of all targets,).
        scores
            Same shape; equal ones are taken in order.
        budget
            Another bound, in entries.
        """
        order = scores.argsort(descending=True, stable=True)
        self.support.zero_()
        self.support[order[: self._budget if budget is None else budget]] = True
        self.support &= scores > 0
        self.delta.copy_(start * self.support)
        self.is_fixed.fill_(True)

    @property
    def trainable(self) -> int:
        """Number of trainable numbers; those on the support once it is fixed."""
        return int(self.support.sum()) if self.is_fixed else super().trainable

    def free(self) -> list[Tensor]:
        """Return dW of each target as long as no support is fixed."""
        return self.split(self.delta)

    def free_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups as long as no support is fixed."""
        return [{"params": [self.delta], "lr": self.config.lr, "weight_decay": 0.0}]

    def forward(self) -> list[Tensor]:
        """Return dW of each target."""
        return self.split(self.delta * self.support) if self.is_fixed else self.free()

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the current phase."""
        if not self.is_fixed:
            return self.free_groups()
        lr = self.config.refit_lr
        if lr is None:
            lr = self.config.lr / math.sqrt(max(1, self.trainable) / len(self.support))
        return [{"params": [self.delta], "lr": lr, "weight_decay": 0.0}]

    @property
    def phase_pending(self) -> bool:
        """Whether the support is still to be fixed."""
        return self.config.max_updated_percent is not None and not self.is_fixed

    def phase_due(self, progress: float) -> bool:
        """Whether the support is to be fixed now."""
        return self.phase_pending and progress >= 1 - self.config.refit_fraction

    @torch.no_grad()
    def begin_phase(self) -> None:
        """Fix the support: the largest entries of dW, which goes on from there."""
        free = torch.cat(self.free())
        self.fix(free, free.abs())


def left(entries: int, budget: int, share: float) -> int:
    """Return how many entries are left at a share of a cubic schedule.

    References
    ----------
    Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878 (2017), eq. 1.
    """
    end = min(budget, entries)
    return end + round((entries - end) * (1 - share) ** 3)
