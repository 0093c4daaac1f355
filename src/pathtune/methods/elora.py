"""ELoRA: a low-rank change of every path, equivariant by construction.

References
----------
Wang, Hu, Tan, Jia, ELoRA: Low-Rank Adaptation for Equivariant GNNs, ICML 2025.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from pydantic import Field

from pathtune.methods import low_rank
from pathtune.paths import Path, PathWeight

PRESETS: Mapping[str, Mapping[str, Any]] = {}

_MATRICES = frozenset({"linear", "fctp", "contraction"})
# MACE's name of the weights of the highest correlation order.
_HIGHEST_ORDER = "weights_max"


class Config(low_rank.Config):
    """Settings of ELoRA; the defaults are the published ones."""

    select: ClassVar[str] = "everything"

    rank: int = Field(16, ge=1)
    alpha: float = Field(16.0, gt=0)
    lr: float = Field(5e-3, gt=0)
    weight_decay: float = Field(1e-8, ge=0)


class Change(low_rank.Change):
    """dW = (α / r) A B for each path, on the raw weights; each path has its own A, B.

    Low rank: linear layers, fully connected tensor products, radial networks, and the
    symmetric contractions of the highest order. Free: what is no matrix in the radial
    functions, such as the frequencies of the basis, and the contractions of lower
    order. Everything else stays as it is.

    The original keeps random rows of A for elements that are absent from the data.
    They are never trained, but B is shared by all elements, so the weights of absent
    elements receive the random change A B. Here A has no such rows: only alive entries
    change, and where elements are absent there are fewer trainable numbers than
    published.
    """

    @classmethod
    def covers(cls, weight: PathWeight) -> bool:
        """Linear, fctp and contraction matrices; all of the radial functions."""
        is_covered_matrix = weight.kind in _MATRICES and weight.is_matrix
        return weight.kind == "radial" or is_covered_matrix

    @classmethod
    def is_low_rank(cls, weight: PathWeight) -> bool:
        """All matrices but the contractions of lower order."""
        is_lower = weight.kind == "contraction" and not weight.name.endswith(
            _HIGHEST_ORDER
        )
        return weight.is_matrix and not is_lower

    def factors(
        self, weight: PathWeight, path: Path | None
    ) -> tuple[Hashable, Hashable]:
        """Return names of the path's own."""
        return path, path

    def initial_std(self, weight: PathWeight) -> float:
        """Return 1; for a contraction (n_elements, n_couplings, C) 1 / n_couplings."""
        return 1 / weight.shape[-2] if weight.kind == "contraction" else 1.0

    def scale(self, weight: PathWeight) -> float:
        """Return α / r."""
        return float(self.config.alpha / self.config.rank)
