"""Accuracy against sparsity and against what was forgotten, of several runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pathtune.properties import PROPERTIES
from pathtune.report.comparisons.learning import LOOKS
from pathtune.report.drawing import Drawing, Points, canvas
from pathtune.report.run import QUANTITIES, Run, mae

DRIFT = "forces_drift_mev_per_angstrom"


def draw(runs: Sequence[Run]) -> Drawing | None:
    """Draw the error of every run against its updated share and its drift."""
    shared = [n for n in PROPERTIES[:2] if all(n in r.properties for r in runs)]
    if not shared:
        return None
    name = shared[-1]  # forces, where all have them
    drifts = [
        float((r.results.get("retention") or {}).get(DRIFT, np.nan)) for r in runs
    ]
    panels = [("updated parameters (%)", [r.updated_percent for r in runs])]
    if np.isfinite(drifts).all():
        panels.append(("force drift from the base (meV/Å)", drifts))
    unit = QUANTITIES[name].unit
    figure, axes = canvas(1, len(panels), height=3.2)
    errors = [mae(run.after, name) for run in runs]
    points = []
    for axis, (label, x) in zip(axes, panels, strict=True):
        for index, run in enumerate(runs):
            colour, _ = LOOKS[index % len(LOOKS)]
            axis.plot(x[index], errors[index], "o", ms=6, color=colour)
            axis.annotate(
                run.name,
                (x[index], errors[index]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7.5,
            )
        texts = [
            f"{r.name}: {e:.3g} {unit}, {v:.3g} {label}"
            for r, e, v in zip(runs, errors, x, strict=True)
        ]
        points.append(Points(axis, x, errors, texts))
        axis.margins(0.25)
        axis.set(xlabel=label)
    axes[0].set_ylabel(f"{QUANTITIES[name].title} MAE ({unit})")
    caption = "Lower and further left is better. Only runs on the same frames compare."
    return Drawing("Accuracy, sparsity and drift", caption, figure, points)
