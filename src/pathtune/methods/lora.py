"""LoRA as MACE has it: a bottleneck of r copies of each irrep beside every layer.

References
----------
Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; the form for
equivariant layers is that of ``mace.modules.lora``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from pydantic import Field

from pathtune.methods import low_rank
from pathtune.paths import Path, PathWeight

PRESETS: Mapping[str, Mapping[str, Any]] = {}


class Config(low_rank.Config):
    """Settings of LoRA; rank and alpha are the vendor's, the rate Tompa et al.'s."""

    select: ClassVar[str] = "linear, radial"

    rank: int = Field(4, ge=1)
    alpha: float = Field(1.0, gt=0)
    lr: float = Field(1e-2, gt=0)


class Change(low_rank.Change):
    """dW = s A B, with A of each input block and B of each output block of a layer.

    On the layers of e3nn the bottleneck is two ``o3.Linear`` in a row. Their path
    normalisation against that of the layer itself is r^(-1/2), so s = α r^(-3/2) on the
    raw weights, and A starts as e3nn starts a layer, from N(0, 1). Elsewhere s = α / r
    and A starts from N(0, 0.001²). The default selection is what the vendor adapts:
    linear layers and radial networks. Fully connected tensor products join in if
    selected, with A and B of each path.
    """

    @classmethod
    def covers(cls, weight: PathWeight) -> bool:
        """Matrices of linear layers, tensor products and radial networks."""
        return weight.kind in ("linear", "fctp", "radial") and weight.is_matrix

    def factors(
        self, weight: PathWeight, path: Path | None
    ) -> tuple[Hashable, Hashable]:
        """Return the input and the output block, where they are known."""
        if weight.kind != "linear" or path is None or path.block_in is None:
            return path, path
        return path.block_in, path.block_out

    def initial_std(self, weight: PathWeight) -> float:
        """Return 1 for a layer of e3nn, 0.001 for others."""
        return 1.0 if weight.is_flat else 1e-3

    def scale(self, weight: PathWeight) -> float:
        """Return α r^(-3/2) for a layer of e3nn, α / r for others."""
        rank = self.config.rank
        return float(self.config.alpha * rank ** (-1.5 if weight.is_flat else -1.0))
