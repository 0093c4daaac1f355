"""Frames prepared once: graphs, labels, and the order in which steps see them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathtune.backends.base import Backend
from pathtune.properties import Structure
from pathtune.training.loss import Labels, collate, labels_of


@dataclass(frozen=True, eq=False)
class Frames:
    """Structures with their graphs and training labels."""

    structures: Sequence[Structure]
    graphs: Sequence[Any]
    labels: Sequence[Labels]
    shifts: Mapping[str, float]

    @classmethod
    def prepare(
        cls,
        backend: Backend,
        structures: Sequence[Structure],
        graphs: Sequence[Any],
        shifts: Mapping[str, float],
    ) -> Frames:
        """Subtract the shifts from the labels and move them to the model's device."""
        labels = [
            labels_of(s, shifts).to(backend.device, backend.dtype) for s in structures
        ]
        return cls(structures, graphs, labels, shifts)

    def batch(self, backend: Backend, indices: Sequence[int]) -> tuple[Any, Labels]:
        """Collate some frames."""
        graph = backend.batch([self.graphs[i] for i in indices])
        return graph, collate([self.labels[i] for i in indices])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """Return the frames of one step; a function of its arguments alone.

    Epochs follow one another without a short last batch. Since nothing is drawn along
    the way, a resumed run needs no sampler state.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(seed, p // n, n)[p % n]) for p in positions]
