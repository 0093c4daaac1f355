"""Dense: what the sparse method trains, without its threshold.

Separates which weights are trained from how sparsely: `full` on the path weights, with
the learning rate of `sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from pathtune.methods import full

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(full.Config):
    """Settings of `full`, with other defaults."""

    select: ClassVar[str] = "all"

    lr: float = Field(1e-2, gt=0)


class Change(full.Change):
    """dW is the parameter itself; it needs no noise to start, so it starts at zero."""
