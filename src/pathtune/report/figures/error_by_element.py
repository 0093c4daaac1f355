"""Errors of what atoms have, by their element."""

from __future__ import annotations

from pathtune.properties import BY_ATOM
from pathtune.report import groups
from pathtune.report.drawing import Drawing
from pathtune.report.run import Run

SECTION = "errors"


def draw(run: Run) -> Drawing | None:
    """Draw the errors of forces, moments and magnetic forces of each element."""
    columns = {}
    for name in BY_ATOM:
        values = run.values(name)
        if len(values):
            symbols = [
                run.frames[frame][0].symbols[atom]
                for frame, atom in zip(values.frame, values.atom, strict=True)
            ]
            columns[name] = groups.errors(symbols, values.error_before, values.error)
    if not columns:
        return None
    caption = f"Mean absolute errors of the {run.judged} frames by chemical element."
    return groups.draw("Error by element", caption, columns)
