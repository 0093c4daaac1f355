"""Errors by configuration type."""

from __future__ import annotations

from pathtune.report import groups
from pathtune.report.drawing import Drawing
from pathtune.report.run import Run

SECTION = "errors"


def draw(run: Run) -> Drawing | None:
    """Draw the errors of each ``config_type``; None where there is only one."""
    kinds = [run.config_type(i) for i in range(len(run.frames))]
    if len(set(kinds)) < 2:
        return None
    columns = {}
    for name in run.properties[:3]:
        values = run.values(name)
        if len(values):
            group = [kinds[i] for i in values.frame]
            columns[name] = groups.errors(group, values.error_before, values.error)
    caption = (
        f"Mean absolute errors of the {run.judged} frames by configuration type "
        "(config_type, or group, in the file)."
    )
    return groups.draw("Error by configuration type", caption, columns)
