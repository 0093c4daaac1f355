"""Undoing one part of a change at a time, and the error that comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from pathtune import metrics
from pathtune.backends.base import Backend
from pathtune.deltafile import Change, DeltaFile
from pathtune.explain.cells import Cells
from pathtune.explain.tables import order
from pathtune.prediction import predict
from pathtune.properties import Structure

PARTS = ("layer", "degree", "element")


def without(delta: DeltaFile, cells: Cells, undone: np.ndarray) -> DeltaFile:
    """Return a delta without some of its entries; the reference-energy shifts stay.

    Parameters
    ----------
    delta
        What was changed.
    cells
        Of this delta.
    undone
        (n_cells,) bool.
    """
    gone = undone[cells.owner]
    names = list(dict.fromkeys(k["parameter"] for k in cells.keys))
    changes: dict[str, Change] = {}
    start = 0
    for name in (name for name in names if name in delta.changes):
        change = delta.changes[name]
        stop = start + len(change.indices)
        kept = torch.from_numpy(~gone[start:stop])
        start = stop
        if kept.any():
            rest = change.remainder
            changes[name] = dataclasses.replace(
                change,
                indices=change.indices[kept],
                values=change.values[kept],
                remainder=None if rest is None else rest[kept],
            )
    return dataclasses.replace(delta, changes=changes)


def ablation(
    backend: Backend,
    delta: DeltaFile,
    cells: Cells,
    structures: Sequence[Structure],
    *,
    batch_size: int = 16,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Undo one layer, one degree, one element of a delta at a time; measure errors.

    Parameters
    ----------
    backend
        The base of the delta.
    delta, cells
        What was changed, and its cells.
    structures
        Labelled.
    batch_size
        Structures in one call of the model.
    console
        Where progress is shown.

    Returns
    -------
    list of dict
        ``undone`` (nothing, layer, degree, element, everything), ``value`` (which
        one), ``updated`` entries undone, and the errors of `pathtune.metrics.errors`.
        With nothing undone they are the tuned model's, with everything undone those of
        the base with the reference energies shifted. A spin layer stays.
    """
    n = len(cells.keys)
    parts: list[tuple[str, Any, np.ndarray]] = [("nothing", None, np.zeros(n, bool))]
    for key in PARTS:
        values = {k[key] for k, m in zip(cells.keys, cells.updated, strict=True) if m}
        for value in sorted(values - {None}, key=lambda v: order({key: v})):
            chosen = np.array([k[key] == value for k in cells.keys])
            parts.append((key, value, chosen))
    parts.append(("everything", None, np.ones(n, bool)))
    stored = backend.stored_weights()
    delta.require_base(stored)
    graphs = [backend.graph(s.atoms) for s in structures]
    rows = []
    for key, value, undone in track(
        parts,
        description="undoing",
        console=console or Console(stderr=True),
        transient=True,
        disable=console is None,
    ):
        predictions = predict(
            backend,
            structures,
            weights=without(delta, cells, undone).merged(stored),
            shifts=delta.shifts,
            graphs=graphs,
            batch_size=batch_size,
        )
        rows.append(
            {
                "undone": key,
                "value": value,
                "updated": int(cells.updated[undone].sum()),
                **metrics.errors(structures, predictions),
            }
        )
    return rows
