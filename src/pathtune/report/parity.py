"""Parity plots: what the models predict against the labels, before and after."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pathtune.properties import Property
from pathtune.report.drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    Drawing,
    Points,
    canvas,
)
from pathtune.report.run import QUANTITIES, Run, Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 600
OUTLIERS = 20


def draw(run: Run, name: Property) -> Drawing | None:
    """Draw labels against predictions of the base and of the tuned model.

    More than `MOST_POINTS` values are counted in hexagons; the `OUTLIERS` with the
    largest errors stay points.

    Parameters
    ----------
    run
        The run.
    name
        The property.
    """
    values = run.values(name)
    if not len(values):
        return None
    quantity = QUANTITIES[name]
    remark = ""
    if name == "energy":
        values, remark = _relative(run, values)
    both = np.concatenate([values.label, values.before, values.after])
    low, high = both.min(), both.max()
    margin = 0.04 * (high - low) or 1.0
    figure, axes = canvas(1, 2, width=7.0, height=3.4)
    points = []
    for place, model, predicted, colour in (
        (axes[0], "Foundation model", values.before, ORANGE),
        (axes[1], "Fine-tuned", values.after, BLUE),
    ):
        error = np.abs(predicted - values.label).mean()
        place.set_title(f"{model}: MAE {error:.3g} {quantity.unit}")
        place.axline((low, low), slope=1, color=MUTED, lw=0.8, ls="--", zorder=1)
        place.set(
            xlim=(low - margin, high + margin),
            ylim=(low - margin, high + margin),
            xlabel=f"reference ({quantity.unit})",
            aspect="equal",
        )
        points += _fill(place, run, values, predicted, colour, quantity.unit)
    axes[0].set_ylabel(f"predicted ({quantity.unit})")
    caption = (
        f"Every {quantity.component} of the {run.judged} frames ({len(values)}), "
        f"against the reference.{remark}"
    )
    if len(values) > MOST_POINTS:
        caption += (
            f" Thinned out: hexagons count the values, darker where there are more, "
            f"and the {OUTLIERS} largest errors are drawn as points."
        )
    return Drawing(f"{quantity.title}: parity", caption, figure, points)


def _relative(run: Run, values: Values) -> tuple[Values, str]:
    """Return energies less what the composition alone explains of the labels."""
    numbers = [tuned.numbers for tuned, _ in run.frames]
    symbols = np.unique(np.concatenate(numbers))
    shares = np.array([[np.mean(n == z) for z in symbols] for n in numbers])
    shares = shares[values.frame]
    if len(values) < 3 * len(symbols):
        offset = np.full(len(values), values.label.mean())
        remark = " Energies are relative to their mean."
    else:
        offset = shares @ np.linalg.lstsq(shares, values.label, rcond=None)[0]
        remark = " Energies are relative to a fit of the labels to the composition."
    moved = {
        name: getattr(values, name) - offset for name in ("label", "before", "after")
    }
    return replace(values, **moved), remark


def _fill(
    axes: Axes,
    run: Run,
    values: Values,
    predicted: np.ndarray,
    colour: str,
    unit: str,
) -> list[Points]:
    """Draw one panel; return what can be read off it."""
    from matplotlib.colors import to_rgba

    chosen = np.arange(len(values))
    found = []
    if len(values) > MOST_POINTS:
        (low, high) = axes.get_xlim()
        hexagons = axes.hexbin(
            values.label,
            predicted,
            gridsize=36,
            extent=(low, high, low, high),
            mincnt=1,
            linewidths=0,
        )
        counts = np.asarray(hexagons.get_array()).astype(int)
        places = np.asarray(hexagons.get_offsets(), float)
        weight = 0.15 + 0.85 * np.log1p(counts) / np.log1p(counts.max())
        hexagons.set_array(None)
        hexagons.set_facecolor([to_rgba(colour, w) for w in weight])
        texts = [f"{n} value{'s' if n > 1 else ''} here" for n in counts]
        found.append(Points(axes, places[:, 0], places[:, 1], texts))
        chosen = np.argsort(-np.abs(predicted - values.label))[:OUTLIERS]
    axes.plot(
        values.label[chosen],
        predicted[chosen],
        ls="none",
        marker="o",
        ms=3.2,
        mfc=to_rgba(colour, 0.55),
        mec=INK if found else colour,
        mew=0.5 if found else 0,
    )
    texts = [
        f"{where(run, int(values.frame[i]), int(values.atom[i]))}: reference "
        f"{values.label[i]:.4g}, predicted {predicted[i]:.4g} {unit}"
        for i in chosen
    ]
    return [Points(axes, values.label[chosen], predicted[chosen], texts), *found]


def where(run: Run, frame: int, atom: int = -1) -> str:
    """Return which structure (and atom) a value is of, for people."""
    if atom < 0:
        return f"frame {frame}"
    return f"frame {frame}, atom {atom} ({run.frames[frame][0].symbols[atom]})"
