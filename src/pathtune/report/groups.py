"""Errors by group (element, configuration type), before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pathtune.properties import BY_ATOM, Property
from pathtune.report.drawing import BLUE, ORANGE, RULE, Drawing, Points, canvas
from pathtune.report.run import QUANTITIES, Run

#: Name of the group -> number of values, MAE before and after.
Errors = Mapping[str, tuple[int, float, float]]


def errors(
    group: Sequence[str] | np.ndarray, before: np.ndarray, after: np.ndarray
) -> Errors:
    """Return the errors of each group.

    Parameters
    ----------
    group
        (n,) names.
    before, after
        (n,) errors.
    """
    names, owner = np.unique(np.asarray(group, dtype=str), return_inverse=True)
    count = np.bincount(owner)
    sums = (np.bincount(owner, np.abs(e)) / count for e in (before, after))
    return {
        str(name): (int(n), float(a), float(b))
        for name, n, a, b in zip(names, count, *sums, strict=True)
    }


def by_element(run: Run) -> dict[Property, Errors]:
    """Return the errors of what atoms have by chemical element."""
    return {
        name: errors(
            [
                run.frames[frame][0].symbols[atom]
                for frame, atom in zip(values.frame, values.atom, strict=True)
            ],
            values.error_before,
            values.error,
        )
        for name in BY_ATOM
        if len(values := run.values(name))
    }


def by_config_type(run: Run) -> dict[Property, Errors]:
    """Return the errors of every property by configuration type."""
    kinds = [run.config_type(i) for i in range(len(run.frames))]
    return {
        name: errors(
            [kinds[i] for i in values.frame], values.error_before, values.error
        )
        for name in run.properties
        if len(values := run.values(name))
    }


def draw(
    title: str, caption: str, columns: Mapping[Property, Errors], *, most: int = 12
) -> Drawing:
    """Draw the errors of every group as a pair of points, one panel a property.

    Parameters
    ----------
    title, caption
        Of the drawing.
    columns
        The errors.
    most
        Groups shown, those with most values first.
    """
    sizes: dict[str, int] = {}
    for column in columns.values():
        for name, (n, _, _) in column.items():
            sizes[name] = max(n, sizes.get(name, 0))
    names = sorted(sizes, key=lambda name: -sizes[name])[:most]
    if len(names) < len(sizes):
        caption += f" Shown are the {most} largest of {len(sizes)} groups."
    height = 1.1 + 0.28 * len(names)
    figure, axes = canvas(1, len(columns), width=7.0, height=height)
    points = []
    for index, (place, (prop, column)) in enumerate(
        zip(axes, columns.items(), strict=True)
    ):
        quantity = QUANTITIES[prop]
        rows = [i for i, name in enumerate(names) if name in column]
        shown = [column[names[i]] for i in rows]
        before, after = (np.array([e[k] for e in shown]) for k in (1, 2))
        place.hlines(rows, before, after, color=RULE, lw=2, zorder=1)
        place.plot(
            before, rows, "o", ms=6, mfc="none", mec=ORANGE, mew=1.6, label="foundation"
        )
        place.plot(after, rows, "o", ms=6, color=BLUE, label="fine-tuned")
        place.set_ylim(len(names) - 0.5, -0.5)
        place.set_xlim(0, 1.08 * max([*before, *after]) or 1)
        place.set_yticks(
            range(len(names)), [_short(n) for n in names] if index == 0 else []
        )
        place.tick_params(axis="y", length=0)
        place.grid(axis="y", visible=False)
        place.set(title=quantity.title, xlabel=f"MAE ({quantity.unit})")
        texts = [
            f"{names[i]}: {a:.3g} → {b:.3g} {quantity.unit} ({n} values)"
            for i, (n, a, b) in zip(rows, shown, strict=True)
        ]
        points += [
            Points(place, before, rows, texts),
            Points(place, after, rows, texts),
        ]
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2
    )
    return Drawing(title, caption, figure, points)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
