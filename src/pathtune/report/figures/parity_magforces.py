"""Parity of the magnetic forces."""

from __future__ import annotations

from pathtune.report import parity
from pathtune.report.drawing import Drawing
from pathtune.report.run import Run

SECTION = "parity"


def draw(run: Run) -> Drawing | None:
    """Draw predicted magnetic forces against the reference."""
    return parity.draw(run, "magforces")
