"""Low rank: dW of each path is a product A B; shared by `elora` and `lora`.

No method by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pathtune.methods import base
from pathtune.paths import Path, PathWeight


class Config(base.MethodConfig):
    """Settings of a low-rank change.

    Parameters
    ----------
    rank
        r, the columns of A and rows of B; not cut to the size of small paths.
    alpha
        α; dW is scaled by α / r.
    lr, weight_decay
        Of A and B.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)


@dataclass(frozen=True)
class Block:
    """The trainable part of a path as a matrix: all axes but the last are its rows.

    Dead rows and columns are left out: A and B hold nothing that belongs to an absent
    element or another head.

    Parameters
    ----------
    n_rows, n_columns
        Shape of the matrix.
    inside
        Which of its entries are trainable; flat indices, ascending.
    path
        None where the whole parameter is the matrix.
    """

    n_rows: int
    n_columns: int
    inside: np.ndarray
    path: Path | None


def blocks(target: base.Target) -> Iterator[Block]:
    """Yield the trainable matrices of a target in the order of its entries."""
    weight = target.weight
    for path in weight.paths or (None,):
        start, stop = (path.start, path.stop) if path else (0, weight.size)
        first, last = np.searchsorted(target.indices, [start, stop])
        own = target.indices[first:last] - start
        if len(own):
            rows, columns = np.divmod(own, (path or weight).shape[-1])
            row_of, i = np.unique(rows, return_inverse=True)
            column_of, j = np.unique(columns, return_inverse=True)
            shape = len(row_of), len(column_of)
            yield Block(*shape, i * shape[1] + j, path)


class Product(nn.Module):
    """dW of one target: s A B in each of its blocks, in the order of its entries.

    Parameters
    ----------
    parts
        The blocks, each with two names; blocks with equal ones share A, or B.
    rank
        r.
    std
        Standard deviation of A at the start; B is zero.
    scale
        s.
    """

    inside: Tensor

    def __init__(
        self,
        parts: Iterable[tuple[Block, tuple[Hashable, Hashable]]],
        *,
        rank: int,
        std: float,
        scale: float,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        self._pairs: list[tuple[int, int]] = []
        known_a: dict[Hashable, int] = {}
        known_b: dict[Hashable, int] = {}
        size = 0
        inside = []
        for block, (name_a, name_b) in parts:
            key_a, key_b = (name_a, block.n_rows), (name_b, block.n_columns)
            if key_a not in known_a:
                known_a[key_a] = len(self.a)
                shape = (block.n_rows, rank)
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.a.append((std * drawn).to(dtype))
            if key_b not in known_b:
                known_b[key_b] = len(self.b)
                self.b.append(torch.zeros(rank, block.n_columns, dtype=dtype))
            self._pairs.append((known_a[key_a], known_b[key_b]))
            inside.append(size + block.inside)
            size += block.n_rows * block.n_columns
        indices = torch.from_numpy(np.concatenate(inside))
        self._is_full = len(indices) == size
        self.register_buffer("inside", indices, persistent=False)

    def forward(self) -> Tensor:
        """Return dW, shape (target.size,)."""
        blocks = [(self.a[i] @ self.b[j]).flatten() for i, j in self._pairs]
        flat = self.scale * torch.cat(blocks)
        return flat if self._is_full else flat[self.inside]


class Free(nn.Module):
    """dW of one target is the parameter itself, zero at the start."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self) -> Tensor:
        """Return dW, shape (target.size,)."""
        return self.delta


class Change(base.Change):
    """dW = s A B for each path, with B = 0 at the start."""

    is_zero_at_start: ClassVar[bool] = True

    @classmethod
    def is_low_rank(cls, weight: PathWeight) -> bool:
        """Whether dW of a covered weight is a product; else it is free."""
        return True

    @abstractmethod
    def factors(
        self, weight: PathWeight, path: Path | None
    ) -> tuple[Hashable, Hashable]:
        """Return two names: paths of one weight with equal ones share A, or B."""

    @abstractmethod
    def initial_std(self, weight: PathWeight) -> float:
        """Return the standard deviation of A at the start."""

    @abstractmethod
    def scale(self, weight: PathWeight) -> float:
        """Return s."""

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Draw A ~ N(0, σ²), set B = 0."""
        self.parts = nn.ModuleList()
        for target in self.targets:
            weight = target.weight
            if not self.is_low_rank(weight):
                self.parts.append(Free(target.size, dtype))
                continue
            product = Product(
                ((b, self.factors(weight, b.path)) for b in blocks(target)),
                rank=self.config.rank,
                std=self.initial_std(weight),
                scale=self.scale(weight),
                dtype=dtype,
                generator=generator,
            )
            self.parts.append(product)

    def forward(self) -> list[Tensor]:
        """Return dW of each target."""
        return [part() for part in self.parts]

    def param_groups(self) -> list[dict[str, Any]]:
        """Return one group of all A, B and free changes."""
        config = self.config
        return [
            {
                "params": list(self.parameters()),
                "lr": config.lr,
                "weight_decay": config.weight_decay,
            }
        ]
