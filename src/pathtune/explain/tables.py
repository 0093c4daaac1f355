"""The tables of an explanation: which keys each one is by, and its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ase.data import atomic_numbers

from pathtune.explain.cells import Cells, rows

Row = Mapping[str, Any]

TABLES: Mapping[str, tuple[str, ...]] = {
    "parameter": ("parameter", "layer", "kind", "role"),
    "layer": ("layer",),
    "kind": ("kind",),
    "role": ("role",),
    "path": ("irrep_in", "irrep_out"),
    "degree": ("degree",),
    "element": ("element",),
    "radial": ("layer", "basis"),
    "cell": ("layer", "degree", "element"),
}
_ROLES_AROUND = {"embedding": -1, "readout": 1 << 30}


def order(row: Row) -> tuple[Any, ...]:
    """Return a sort key: embedding, interactions, readout; degree; element."""
    layer, element = row.get("layer"), row.get("element")
    place = 0
    if layer is not None:
        place = int(layer) if layer.isdigit() else _ROLES_AROUND.get(layer, -2)
    degree, basis = row.get("degree"), row.get("basis")
    return (
        place,
        -1 if degree is None else degree,
        0 if element is None else atomic_numbers[element],
        -1 if basis is None else basis,
    )


def tables(cells: Cells) -> dict[str, list[dict[str, Any]]]:
    """Return every table of `TABLES`; rows without an entry that could change go.

    Parameters
    ----------
    cells
        From `pathtune.explain.cells.measure`.
    """
    found = {}
    for name, by in TABLES.items():
        part = (
            cells.where(lambda k: k["basis"] is not None) if name == "radial" else cells
        )
        kept = [r for r in rows(part, by) if r["alive"]]
        found[name] = sorted(kept, key=order) if name != "parameter" else kept
    return found


def ranking(cell_table: Sequence[Row], n: int = 20) -> list[dict[str, Any]]:
    """Return the `n` cells that hold most of the change, largest share first."""
    moved = [dict(row) for row in cell_table if row["updated"]]
    return sorted(moved, key=lambda row: -row["share"])[:n]
