"""Replay: structures with the base model's own labels, trained on beside the data.

They hold the model where the data say nothing. The labels are what the base predicts,
with its reference energies and not those of the data: shifts are no part of the
weights, so both can be learned at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console

from pathtune import retention, structures
from pathtune.backends.base import Backend, require_elements
from pathtune.config import RunConfig
from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import Prediction, Property, Structure
from pathtune.training import distributed
from pathtune.training.data import EVALUATED_AT_ONCE, Frames, Source

# Magnetic moments are learned where the data have them, and nowhere else.
LABELS: tuple[Property, ...] = ("energy", "forces", "stress")


def draw(config: RunConfig, backend: Backend) -> list[Structure]:
    """Return the structures a run replays, without labels; [] where it has none.

    Equal settings give equal structures; none of them is in the retention set.

    Raises
    ------
    UsageError, PathtuneError
        If the file cannot be read, or the model cannot predict it.
    """
    seed = (1, config.seed)
    if config.replay_file is None:
        crystals = retention.prototypes(backend.elements, config.replay or 0, seed=seed)
        found = enumerate(crystals)
        return [Structure(atoms, source=f"replay:{i}") for i, atoms in found]
    frames: Sequence[Structure] = structures.read(
        config.replay_file, allow_unlabelled=True
    )
    n = len(frames)
    if config.replay is not None and config.replay < n:
        chosen = np.random.default_rng(seed).choice(n, config.replay, replace=False)
        frames = structures.take(frames, sorted(chosen.tolist()))
    require_elements(backend, structures.survey(frames).elements)
    structures.require_cells(frames)
    return [Structure(s.atoms, source=s.source) for s in frames]


def label(
    drawn: Sequence[Structure], config: RunConfig, backend: Backend, console: Console
) -> Source:
    """Return drawn structures as a source of batches, labelled by the base.

    Structures where the base is not `pathtune.retention.reasonable` are left out.

    Raises
    ------
    UsageError
        If the weights of energy, forces and stress are all zero.
    PathtuneError
        If no structure is left.
    """
    weights = config.loss_weights
    properties = {
        name: weights[name]
        for name in LABELS
        if weights[name] > 0 and name in backend.properties
    }
    if not properties:
        raise UsageError("replay needs a weight of energy, forces or stress above zero")
    frames = Frames.prepare(backend, list(drawn))
    passes = frames.passes(
        range(len(drawn)), config, config.batch_size or EVALUATED_AT_ONCE
    )
    predicted: dict[int, Prediction] = {}
    for part, predictions in frames.predictions(passes, properties=LABELS):
        predicted |= zip(part.rows, predictions, strict=True)
    for other in distributed.gather(predicted):
        predicted |= other
    kept = retention.reasonable([predicted[i] for i in range(len(drawn))])
    if not kept:
        raise PathtuneError(
            f"replay: in all {len(drawn)} structures the base predicts forces above "
            f"{retention.LARGEST_FORCE:g} eV/Å; give others with --replay-file"
        )
    labelled = [
        replace(drawn[i], labels=predicted[i], weight=config.replay_weight)
        for i in kept
    ]
    assert frames.ready is not None
    graphs = [frames.ready[0][i] for i in kept]
    console.print(
        f"replay: {len(kept)} structures labelled by the base ({', '.join(properties)};"
        f" weight {config.replay_weight:g}), {len(drawn) - len(kept)} left out for "
        f"forces above {retention.LARGEST_FORCE:g} eV/Å",
        highlight=False,
    )
    frames = replace(
        frames,
        structures=labelled,
        survey=structures.survey(labelled),
        ready=(graphs, []),
        n_edges=frames.n_edges[kept],
    )
    return Source(frames.with_shifts({}), properties)
