"""The finest cells of a change, one long table, and sums of them by any key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pathtune.deltafile import Change
from pathtune.paths import PathWeight

KEYS = (
    *("parameter", "layer", "kind", "role", "irrep_in", "irrep_out"),
    *("degree", "element", "basis"),
)
COLUMNS = ("entries", "alive", "updated", "mean", "scatter", "square", "largest")
#: Letters of the degrees 0, 1, 2, ... as chemists write them.
CHANNELS = "spdfghiklm"


@dataclass(frozen=True, eq=False)
class Cells:
    """Every (parameter, path, element or basis function) slice of a model.

    Parameters
    ----------
    keys
        The `KEYS` of each cell, (n_cells,).
    entries, alive, updated
        (n_cells,) numbers of entries; `alive` are those that could be trained.
    mean, scatter
        (n_cells,) mean of W over the alive entries, and the sum of (W - mean)^2.
    square, largest
        (n_cells,) sum of dW^2, and the largest of them.
    squares
        (n_updated,) dW^2 of each updated entry.
    owner
        (n_updated,) its cell. Entries are in the order of the records, then of the
        flat indices.
    """

    keys: Sequence[Mapping[str, Any]]
    entries: np.ndarray
    alive: np.ndarray
    updated: np.ndarray
    mean: np.ndarray
    scatter: np.ndarray
    square: np.ndarray
    largest: np.ndarray
    squares: np.ndarray
    owner: np.ndarray

    def groups(self, by: Sequence[str]) -> tuple[list[tuple[Any, ...]], np.ndarray]:
        """Return the distinct values of some keys, and the group of each cell."""
        index: dict[tuple[Any, ...], int] = {}
        group = [
            index.setdefault(tuple(k[b] for b in by), len(index)) for k in self.keys
        ]
        return list(index), np.array(group, dtype=np.int64)

    def where(self, wanted: Callable[[Mapping[str, Any]], bool]) -> Cells:
        """Return the cells whose keys are `wanted`, and their entries."""
        kept = np.array([wanted(k) for k in self.keys], dtype=bool)
        new = np.cumsum(kept, dtype=np.int32) - 1
        inside = kept[self.owner]
        return Cells(
            [k for k, keep in zip(self.keys, kept, strict=True) if keep],
            **{name: getattr(self, name)[kept] for name in COLUMNS},
            squares=self.squares[inside],
            owner=new[self.owner[inside]],
        )


def layer_of(record: PathWeight) -> str:
    """Return the interaction's index as text, or the role outside of them."""
    return record.role if record.layer is None else str(record.layer)


def labels(record: PathWeight) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the cells of one parameter, and the cell of each entry.

    Returns
    -------
    list of dict
        The `KEYS` of each cell.
    array
        (size,) int32.
    """
    common: dict[str, Any] = dict.fromkeys(KEYS) | {
        "parameter": record.name,
        "layer": layer_of(record),
        "kind": record.kind,
        "role": record.role,
    }
    owner = np.zeros(record.size, dtype=np.int32)
    if not record.paths:
        if record.basis_axis is None:
            return [common], owner
        along = np.moveaxis(owner.reshape(record.shape), record.basis_axis, 0)
        along.T[...] = np.arange(len(along))
        return [common | {"basis": i} for i in range(len(along))], owner
    keys: list[dict[str, Any]] = []
    for path in record.paths:
        block = owner[path.start : path.stop].reshape(path.shape)
        irreps = {"irrep_in": path.irrep_in, "irrep_out": path.irrep_out}
        cell = common | irreps | {"degree": path.l}
        if path.element_axis is None:
            block[...] = len(keys)
            keys.append(cell)
        else:
            along = np.moveaxis(block, path.element_axis, 0)
            along.T[...] = len(keys) + np.arange(len(along))
            keys += [cell | {"element": symbol} for symbol in record.elements]
    return keys, owner


def measure(
    records: Sequence[PathWeight],
    base: Mapping[str, Tensor],
    changes: Mapping[str, Change],
    alive: Mapping[str, np.ndarray],
) -> Cells:
    """Measure a change in every cell of a model.

    Parameters
    ----------
    records
        Every parameter of the model.
    base
        The base's parameters.
    changes
        Parameter name -> changed entries.
    alive
        Parameter name -> flat indices that could be trained; changed entries are taken
        as alive in any case.
    """
    keys: list[dict[str, Any]] = []
    columns: list[list[np.ndarray]] = []
    n_updated = sum(len(change.indices) for change in changes.values())
    squares, owners = np.empty(n_updated), np.empty(n_updated, dtype=np.int32)
    start = 0
    for record in records:
        own, owner = labels(record)
        n = len(own)
        trained = np.zeros(record.size, dtype=bool)
        trained[alive.get(record.name, [])] = True
        updated = np.zeros(n, dtype=np.int64)
        square, largest = np.zeros(n), np.zeros(n)
        if change := changes.get(record.name):
            indices = change.indices.numpy()
            trained[indices] = True
            here = slice(start, start + len(indices))
            start = here.stop
            np.square(change.values.numpy(), out=squares[here])
            changed = owner[indices]
            updated[:] = np.bincount(changed, minlength=n)
            square[:] = np.bincount(changed, squares[here], minlength=n)
            np.maximum.at(largest, changed, squares[here])
            owners[here] = changed + len(keys)
        inside = owner[trained]
        weight = base[record.name].flatten().double().numpy()[trained]
        count = np.bincount(inside, minlength=n)
        mean = np.bincount(inside, weight, minlength=n) / np.maximum(count, 1)
        weight -= mean[inside]
        scatter = np.bincount(inside, weight**2, minlength=n)
        entries = np.bincount(owner, minlength=n)
        columns.append([entries, count, updated, mean, scatter, square, largest])
        keys += own
    by_cell = dict(
        zip(COLUMNS, map(np.concatenate, zip(*columns, strict=True)), strict=True)
    )
    return Cells(keys, **by_cell, squares=squares, owner=owners)


def rows(cells: Cells, by: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row of counts for each combination of some keys, see `KEYS`.

    Returns
    -------
    list of dict
        The keys; ``entries``, ``alive``, ``updated``; ``density`` = updated / alive
        (None where nothing is alive); ``norm`` of dW; ``relative_norm`` = |dW| / |W|
        over the alive entries (None where W is zero); ``one_minus_r2`` =
        |dW|^2 / sum (W - mean W)^2 over the alive entries, 0 where nothing changed and
        None where all W of the group are equal; ``largest`` |dW|; ``share`` of the
        squared norm of the whole change.

    References
    ----------
    1 - R^2 of W + dW on W: Cho et al., arXiv 2606.18691, figures without a formula;
    this is the coefficient of determination with W as the data.
    """
    names, group = cells.groups(by)
    n = len(names)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, values, minlength=n)

    entries, alive, updated = (
        total(c).astype(int) for c in (cells.entries, cells.alive, cells.updated)
    )
    mean = total(cells.alive * cells.mean) / np.maximum(alive, 1)
    between = cells.alive * (cells.mean - mean[group]) ** 2
    scatter = total(cells.scatter + between)
    weight_square = scatter + alive * mean**2
    square, largest = total(cells.square), np.zeros(n)
    np.maximum.at(largest, group, cells.largest)
    whole = square.sum()
    # Below this the scatter is what rounding leaves of equal weights.
    is_constant = scatter <= 1e-24 * weight_square
    table = []
    for i, name in enumerate(names):
        r2: float | None = None
        if not updated[i]:
            r2 = 0.0
        elif not is_constant[i]:
            r2 = float(square[i] / scatter[i])
        table.append(
            {
                **dict(zip(by, name, strict=True)),
                "entries": int(entries[i]),
                "alive": int(alive[i]),
                "updated": int(updated[i]),
                "density": float(updated[i] / alive[i]) if alive[i] else None,
                "norm": float(square[i] ** 0.5),
                "relative_norm": float((square[i] / weight_square[i]) ** 0.5)
                if weight_square[i]
                else None,
                "one_minus_r2": r2,
                "largest": float(largest[i] ** 0.5),
                "share": float(square[i] / whole) if whole else 0.0,
            }
        )
    return table
