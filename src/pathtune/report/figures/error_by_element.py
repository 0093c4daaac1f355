"""Errors of what atoms have, by their element."""

from __future__ import annotations

from pathtune.report import groups
from pathtune.report.drawing import Drawing
from pathtune.report.run import Run

SECTION = "errors"


def draw(run: Run) -> Drawing | None:
    """Draw the errors of what atoms have by element; None where there is only one."""
    columns = groups.by_element(run)
    if len({element for column in columns.values() for element in column}) < 2:
        return None
    caption = f"Mean absolute errors of the {run.judged} frames by chemical element."
    return groups.draw("Error by element", caption, columns)
