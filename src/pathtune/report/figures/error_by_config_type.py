"""Errors by configuration type."""

from __future__ import annotations

from pathtune.report import groups
from pathtune.report.drawing import Drawing
from pathtune.report.run import Run

SECTION = "errors"


def draw(run: Run) -> Drawing | None:
    """Draw the errors of each ``config_type``; None where there is only one."""
    columns = groups.by_config_type(run)
    if len({kind for column in columns.values() for kind in column}) < 2:
        return None
    columns = dict(list(columns.items())[:3])
    caption = (
        f"Mean absolute errors of the {run.judged} frames by configuration type "
        "(config_type, or group, in the file)."
    )
    return groups.draw("Error by configuration type", caption, columns)
