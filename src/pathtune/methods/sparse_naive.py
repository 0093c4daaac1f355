"""Naive sparse: the threshold decays and learns as dW does; the ablation of `sparse`.

As in the original STR code, dW and τ share one weight decay and one learning rate, so
the decay that raises the threshold also pulls dW to zero. Cho et al. (arXiv 2606.18691)
call this unstable and decouple the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pathtune.methods import sparse

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "low": {"weight_decay": 0.01},
    "high": {"weight_decay": 0.3, "max_updated_percent": 3.0},
}


class Config(sparse.ThresholdConfig):
    """Settings of the naive method; those of `sparse`, less what is shared.

    Parameters
    ----------
    weight_decay
        Of dW and of τ.
    """

    weight_decay: float = Field(0.01, ge=0)


class Change(sparse.Change):
    """dW = S(dW, sigmoid(τ)) as in `sparse`; only the optimizer's groups differ."""

    def free_groups(self) -> list[dict[str, Any]]:
        """Return one group of dW and τ."""
        return [
            {
                "params": [self.delta, self.tau],
                "lr": self.config.lr,
                "weight_decay": self.config.weight_decay,
            }
        ]
