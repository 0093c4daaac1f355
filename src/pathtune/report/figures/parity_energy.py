"""Parity of the energies per atom."""

from __future__ import annotations

from pathtune.report import parity
from pathtune.report.drawing import Drawing
from pathtune.report.run import Run

SECTION = "parity"


def draw(run: Run) -> Drawing | None:
    """Draw predicted energies per atom against the reference."""
    return parity.draw(run, "energy")
