"""Thresholds and sparsity of every layer while it is trained."""

from __future__ import annotations

import numpy as np

from pathtune.report.drawing import BLUE, Drawing, Points, canvas, logarithmic
from pathtune.report.run import Run

SECTION = "training"


def draw(run: Run) -> Drawing | None:
    """Draw each parameter's threshold (where the method has one) and updated share."""
    if len(run.curve) < 2:
        return None
    names = list(run.curve[0]["layers"])
    has_threshold = any("threshold" in x for x in run.curve[0]["layers"].values())
    figure, axes = canvas(1, 1 + has_threshold, height=3.2)
    steps = [r["step"] for r in run.curve]
    series, points = {}, []
    for index, name in enumerate(names):
        series[f"layer-{index}"] = name
        layers = [r["layers"].get(name, {}) for r in run.curve]
        shares = [100 * x.get("updated", 0) / max(1, x.get("alive", 1)) for x in layers]
        curves = [(axes[0], shares, "{:.3g} % updated")]
        if has_threshold:
            mean = [float(np.mean(x.get("threshold", np.nan))) for x in layers]
            curves.append((axes[1], mean, "threshold {:.3g}"))
        for panel, (place, values, text) in enumerate(curves):
            gid = f"layer-{index}.{panel}"
            place.plot(steps, values, color=BLUE, alpha=0.6, lw=1.2, gid=gid)
            known = np.flatnonzero(np.isfinite(values))
            texts = [
                f"{name}, step {steps[i]}: {text.format(values[i])}" for i in known
            ]
            x, y = np.array(steps)[known], np.array(values)[known]
            points.append(Points(place, x, y, texts))
    axes[0].set(title="Updated entries", ylabel="% of the layer", xlabel="step")
    axes[0].set_ylim(0)
    if has_threshold:
        axes[1].set(title="Threshold", xlabel="step")
        logarithmic(axes[1])
    caption = f"One line for each of the {len(names)} parameters that are trained."
    if has_threshold:
        caption += " Changes below a layer's threshold are exactly zero."
    return Drawing("Sparsity by layer", caption, figure, points, series)
