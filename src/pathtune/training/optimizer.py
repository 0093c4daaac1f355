"""The optimizer: schedule-free AdamW, and the one place that switches its mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor


def build(
    groups: list[dict[str, Any]], warmup_steps: int, averaging_power: float = 0.0
) -> AdamWScheduleFree:
    """Return the optimizer in train mode.

    Parameters
    ----------
    groups
        From `Change.param_groups`; none for a method that trains nothing.
    warmup_steps
        Steps over which the learning rate rises linearly.
    averaging_power
        r: step t has weight t^r in the average; 0 is the plain average.

    References
    ----------
    Defazio et al., The Road Less Scheduled, NeurIPS 2024.
    """
    # The library refuses an empty list, but not an empty group.
    groups = groups or [{"params": []}]
    optimizer = AdamWScheduleFree(groups, warmup_steps=warmup_steps, r=averaging_power)
    optimizer.train()
    return optimizer


def parameters(optimizer: AdamWScheduleFree) -> list[Tensor]:
    """Return every parameter the optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def averaged(optimizer: AdamWScheduleFree) -> Iterator[None]:
    """Hold the averaged iterate x: for evaluating, counting, merging and saving.

    The training iterate y is put back bit for bit afterwards, so how often a run is
    evaluated or saved does not change it.
    """
    iterate = [p.detach().clone() for p in parameters(optimizer)]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters(optimizer), iterate, strict=True):
                parameter.copy_(value)
