"""The frames of a run: graphs and labels, batches by work, the order of the steps."""

from __future__ import annotations

import bisect
import functools
import os
import pickle
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pathtune.backends.base import Backend
from pathtune.config import RunConfig
from pathtune.errors import PathtuneError
from pathtune.prediction import moved_to, predict_batch, with_shifts
from pathtune.properties import Prediction, Property, Structure
from pathtune.structures import Survey, survey
from pathtune.training import distributed
from pathtune.training.loss import Labels, collate, labels_of

EVALUATED_AT_ONCE = 64


class Part(NamedTuple):
    """Structures that go through the model together.

    Parameters
    ----------
    rows
        Their places in the data.
    structures, graphs
        One each.
    labels
        Of all of them, reference-energy shifts subtracted.
    """

    rows: list[int]
    structures: list[Structure]
    graphs: list[Any]
    labels: Labels


@dataclass(frozen=True, eq=False)
class Frames:
    """Structures with their graphs and training labels, or the way to make them.

    Data that fit in memory are prepared once. Structures that stay in their file are
    read, and their graphs built, by worker processes each time they are needed.
    """

    backend: Backend
    structures: Sequence[Structure]
    survey: Survey
    shifts: Mapping[str, float]
    workers: int
    ready: tuple[list[Any], list[Labels]] | None
    #: Directed edges of each graph.
    n_edges: np.ndarray

    @classmethod
    def prepare(
        cls,
        backend: Backend,
        structures: Sequence[Structure],
        *,
        workers: int = 0,
        count_edges: bool = True,
    ) -> Frames:
        """Build graphs and labels of structures in memory; none of those in a file.

        Parameters
        ----------
        backend, structures
            Whose graphs, and of what.
        workers
            Processes that read structures from a file.
        count_edges
            Go through a file once to count the edges; otherwise they are zero.
        """
        n_edges = np.zeros(len(structures), int)
        found = cls(backend, structures, survey(structures), {}, workers, None, n_edges)
        if isinstance(structures, list):
            graphs = [backend.graph(s.atoms) for s in structures]
            n_edges[:] = [backend.n_edges(g) for g in graphs]
            return replace(found, ready=(graphs, [])).with_shifts({})
        if count_edges:
            mine = range(len(structures))[distributed.rank() :: distributed.size()]
            for (part,) in found.load([[i]] for i in mine):
                n_edges[part.rows] = backend.n_edges(part.graphs[0])
            n_edges[:] = sum(distributed.gather(n_edges))
        return found

    def with_shifts(self, shifts: Mapping[str, float]) -> Frames:
        """Return the same frames with the shifts subtracted from their labels."""
        frames = replace(self, shifts=shifts)
        if self.ready is None:
            return frames
        labels = [
            labels_of(s, shifts).to(self.backend.device, self.backend.dtype)
            for s in self.structures
        ]
        return replace(frames, ready=(self.ready[0], labels))

    def __len__(self) -> int:
        return len(self.structures)

    def part(self, rows: Sequence[int]) -> Part:
        """Return some frames; a worker process that calls this stays on the CPU."""
        structures = [self.structures[i] for i in rows]
        if self.ready is not None:
            graphs, ready = self.ready
            labels = [ready[i] for i in rows]
            return Part(
                list(rows), structures, [graphs[i] for i in rows], collate(labels)
            )
        graphs = [self.backend.graph(s.atoms) for s in structures]
        labels = [labels_of(s, self.shifts) for s in structures]
        together = collate(labels).to(torch.device("cpu"), self.backend.dtype)
        return Part(list(rows), structures, graphs, together)

    def load(self, steps: Iterable[list[list[int]]]) -> Iterator[list[Part]]:
        """Yield the parts of one step after the other, read ahead by the workers."""
        if self.ready is not None or not self.workers:
            yield from ([self.part(rows) for rows in step] for step in steps)
            return
        loader = DataLoader(
            _Reader(self),
            sampler=steps,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
            # Nothing has to be pickled, and the vendor not to be imported again.
            multiprocessing_context="fork",
            generator=torch.Generator(),
        )
        for content in map(pickle.loads, loader):
            if isinstance(content, PathtuneError):
                raise content
            yield content

    def predictions(
        self,
        passes: Sequence[list[int]],
        *,
        weights: Mapping[str, Tensor] | None = None,
        shifts: Mapping[str, float] | None = None,
        properties: Collection[Property] | None = None,
    ) -> Iterator[tuple[Part, list[Prediction]]]:
        """Predict frames, this process its share of the passes.

        Parameters
        ----------
        passes
            From `passes`.
        weights, shifts, properties
            See `pathtune.prediction.predict`.
        """
        moved = moved_to(self.backend, weights or {})
        mine = passes[distributed.rank() :: distributed.size()]
        for (part,) in self.load([rows] for rows in mine):
            predicted = predict_batch(
                self.backend,
                part.structures,
                part.graphs,
                moved,
                properties or self.backend.properties,
            )
            yield part, with_shifts(part.structures, predicted, shifts or {})

    def passes(
        self, rows: Sequence[int], config: RunConfig, most: int | None = None
    ) -> list[list[int]]:
        """Cut rows, in their order, into passes within the bounds of atoms and edges.

        Parameters
        ----------
        rows
            Places in the data.
        config
            Its ``max_atoms_per_batch`` and ``max_edges_per_batch``.
        most
            Most frames in a pass.

        Returns
        -------
        list
            Every row once; a frame beyond a bound is a pass of its own.
        """
        sizes, bounds = [], []
        if most is not None:
            sizes.append(np.ones(len(self), int))
            bounds.append(most)
        if config.max_atoms_per_batch is not None:
            sizes.append(self.survey.n_atoms)
            bounds.append(config.max_atoms_per_batch)
        if isinstance(config.max_edges_per_batch, int):
            sizes.append(self.n_edges)
            bounds.append(config.max_edges_per_batch)
        chosen = np.array([size[rows] for size in sizes]).T.tolist()
        found: list[list[int]] = []
        total = bounds
        for row, size in zip(rows, chosen or [[]] * len(rows), strict=True):
            total = [a + b for a, b in zip(total, size, strict=True)]
            if not found or any(a > b for a, b in zip(total, bounds, strict=True)):
                found.append([])
                total = size
            found[-1].append(int(row))
        return found

    def labelled(
        self, rows: Sequence[int] | slice, properties: Collection[Property]
    ) -> dict[Property, int]:
        """Return how many structures or atoms each term of a loss averages over."""
        return {name: int(self.survey.rows(name, rows).sum()) for name in properties}


class Source(NamedTuple):
    """Frames, and what is learned from them.

    Parameters
    ----------
    frames
        Where a step takes its batch from.
    properties
        Property -> weight of its loss term.
    """

    frames: Frames
    properties: Mapping[Property, float]


class Batch(NamedTuple):
    """What a step takes from one source.

    Parameters
    ----------
    source
        The source.
    rows
        The frames of all processes together; the loss averages over them.
    parts
        Those of this process, one pass through the model each.
    """

    source: Source
    rows: list[int]
    parts: list[Part]


class _Reader(Dataset[bytes]):
    """What a worker process does; tensors as bytes need no shared memory."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    def __getitem__(self, step: list[list[int]]) -> bytes:
        try:
            return pickle.dumps([self._frames.part(rows) for rows in step])
        except PathtuneError as error:
            return pickle.dumps(error)


def _unchanged(content: Any) -> Any:
    return content


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach all processes, to the one that trains."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def default_workers() -> int:
    """Return how many processes read structures from files: a share of the cores."""
    if sys.platform != "linux":  # forking a process that computes is safe there only
        return 0
    cores = len(os.sched_getaffinity(0)) // distributed.local_size()
    return max(1, min(4, cores - 1))


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


class Order:
    """Which frames each step sees: a function of the settings and the step alone.

    With a batch size every step has so many frames, see `batch_indices`. Without one
    the frames of an epoch, in random order, are packed into batches within the bounds
    of atoms and edges.

    Parameters
    ----------
    frames
        Training frames.
    config
        Resolved settings; a batch size larger than the data is that of the data.
    """

    def __init__(self, frames: Frames, config: RunConfig) -> None:
        if config.batch_size is not None:
            size = min(config.batch_size, len(frames))
            config = config.model_copy(update={"batch_size": size})
        self._frames, self._config = frames, config
        self._starts = [0]  # first step of each epoch
        self._latest: tuple[int, list[list[int]]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """Return the frames of one step."""
        config, n = self._config, len(self._frames)
        if config.batch_size is not None:
            return batch_indices(config.seed, step, config.batch_size, n)
        epoch, place = self._locate(step)
        return self._packed(epoch)[place]

    def epoch(self, step: int) -> float:
        """Return how many times the steps before this one went through the data."""
        if self._config.batch_size is not None:
            return step * self._config.batch_size / len(self._frames)
        epoch, place = self._locate(step)
        return epoch + place / len(self._packed(epoch))

    def steps(self, epochs: int) -> int:
        """Return how many steps go through the data so many times."""
        if self._config.batch_size is not None:
            return -(-epochs * len(self._frames) // self._config.batch_size)
        while len(self._starts) <= epochs:
            self._extend()
        return self._starts[epochs]

    def passes(self, step: int) -> list[list[int]]:
        """Return the passes of this process in one step.

        The frames are dealt out by size, so that all processes have the same to do.
        """
        rows, size = self.rows(step), distributed.size()
        if size > 1:
            n_atoms = self._frames.survey.n_atoms
            rows = sorted(rows, key=lambda i: (-n_atoms[i], i))
        return self._frames.passes(rows[distributed.rank() :: size], self._config)

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and its place there."""
        while self._starts[-1] <= step:
            self._extend()
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def _extend(self) -> None:
        epoch = len(self._starts) - 1
        self._starts.append(self._starts[-1] + len(self._packed(epoch)))

    def _packed(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch; the latest one asked for is kept."""
        if self._latest[0] != epoch:
            rows = _permutation(self._config.seed, epoch, len(self._frames))
            self._latest = epoch, self._frames.passes(rows.tolist(), self._config)
        return self._latest[1]


def batches_by_step(
    sources: Sequence[Source], config: RunConfig, steps: range
) -> Iterator[list[Batch]]:
    """Yield what one step after the other takes from each source.

    Parameters
    ----------
    sources
        Each is gone through in an order of its own, see `Order`.
    config
        Resolved settings.
    steps
        Numbers of the steps.
    """
    orders = [Order(source.frames, config) for source in sources]
    loaded = [
        source.frames.load(map(order.passes, steps))
        for source, order in zip(sources, orders, strict=True)
    ]
    for step in steps:
        yield [
            Batch(source, order.rows(step), next(parts))
            for source, order, parts in zip(sources, orders, loaded, strict=True)
        ]
