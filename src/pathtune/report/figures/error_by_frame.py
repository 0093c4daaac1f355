"""Errors frame by frame: where the outliers are."""

from __future__ import annotations

from pathtune.report.drawing import BLUE, ORANGE, Drawing, Points, canvas
from pathtune.report.outliers import by_frame
from pathtune.report.run import QUANTITIES, Run

SECTION = "errors"
MARKED = 3
MOST = 1000


def draw(run: Run) -> Drawing | None:
    """Draw the root mean square error of each frame against its index."""
    found = by_frame(run)
    if found is None:
        return None
    name, errors = found
    unit = QUANTITIES[name].unit
    figure, (axes,) = canvas(height=2.4)
    caption = (
        f"{QUANTITIES[name].title} of each {run.judged} frame, fine-tuned model; the "
        f"{min(MARKED, len(errors))} largest are marked with their index."
    )
    worst = sorted(errors, key=lambda i: -errors[i])
    if len(errors) > MOST:
        shown = {*worst[: MOST // 10], *list(errors)[:: -(-len(errors) // MOST)]}
        errors = {i: error for i, error in errors.items() if i in shown}
        caption += f" Thinned out: {len(errors)} of {len(worst)}, the worst among them."
    x, y = list(errors), list(errors.values())
    axes.plot(x, y, ls="none", marker="o", ms=3, color=BLUE, alpha=0.7)
    for index in worst[:MARKED]:
        axes.plot(index, errors[index], "o", ms=4, color=ORANGE)
        axes.annotate(
            str(index),
            (index, errors[index]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set(xlabel="frame (index in the file)", ylabel=f"RMSE ({unit})")
    axes.set_ylim(0)
    texts = [
        f"frame {i} ({run.frames[i][0].symbols.get_chemical_formula()}): "
        f"{error:.3g} {unit}"
        for i, error in errors.items()
    ]
    return Drawing("Error by frame", caption, figure, [Points(axes, x, y, texts)])
