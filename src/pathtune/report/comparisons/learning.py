"""Learning curves of several runs."""

from __future__ import annotations

from collections.abc import Sequence

from pathtune.properties import PROPERTIES
from pathtune.report.drawing import Drawing, Points, canvas, logarithmic
from pathtune.report.run import QUANTITIES, Run, mae

# Colour and line style, so that lines differ without colour as well.
LOOKS = [
    (colour, style)
    for style in ("-", "--", ":")
    for colour in ("#0072b2", "#d55e00", "#00795b", "#a6548c", "#5b6470")
]


def draw(runs: Sequence[Run]) -> Drawing | None:
    """Draw the validation error of every run against the step."""
    common = [
        name
        for name in PROPERTIES[:2]
        if all(len(r.curve) > 1 and name in r.properties for r in runs)
    ]
    if not common:
        return None
    figure, axes = canvas(1, len(common), height=3.2)
    points = []
    for axis, name in zip(axes, common, strict=True):
        quantity = QUANTITIES[name]
        for index, run in enumerate(runs):
            colour, style = LOOKS[index % len(LOOKS)]
            x = [r["step"] for r in run.curve]
            y = [mae(r["valid"], name) for r in run.curve]
            axis.plot(x, y, color=colour, ls=style, label=run.name)
            texts = [
                f"{run.name}, step {s}: {v:.4g} {quantity.unit}"
                for s, v in zip(x, y, strict=True)
            ]
            points.append(Points(axis, x, y, texts))
        axis.set(title=quantity.title, xlabel="step")
        logarithmic(axis)
        axis.set_ylabel(f"validation MAE ({quantity.unit})")
    axes[0].legend()
    caption = "Errors on each run's own validation frames."
    return Drawing("Learning curves", caption, figure, points)
