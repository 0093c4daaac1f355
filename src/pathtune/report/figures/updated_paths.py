"""Heat map of what was updated: layer by degree, for each element."""

from __future__ import annotations

from typing import Any

from pathtune.report.drawing import BLUE, INK, MUTED, Drawing, Points, canvas
from pathtune.report.run import Run

SECTION = "change"
MOST_ELEMENTS = 5
SHARED = "shared by all elements"


def draw(run: Run) -> Drawing | None:
    """Draw the share of updated entries of each (layer, degree, element)."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    if run.explanation is None:
        return None
    cells = [c for c in run.explanation["tables"]["cell"] if c["density"] is not None]
    if not cells:
        return None
    layers = list(dict.fromkeys(c["layer"] for c in cells))
    degrees = sorted({_degree(c) for c in cells})
    panels: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        panels.setdefault(cell["element"] or SHARED, []).append(cell)
    ordered = sorted(
        panels, key=lambda p: (p != SHARED, -sum(c["share"] for c in panels[p]))
    )
    shown = ordered[: 1 + MOST_ELEMENTS]
    densest = max(c["density"] for c in cells) or 1.0
    figure, axes = canvas(1, len(shown), width=7.0, height=1.3 + 0.34 * len(layers))
    points = []
    for axis, panel in zip(axes, shown, strict=True):
        boxes, colours, texts, places = [], [], [], []
        for cell in panels[panel]:
            x, y = degrees.index(_degree(cell)), layers.index(cell["layer"])
            boxes.append(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94))
            strength = (cell["density"] / densest) ** 0.5
            colours.append(to_rgba(BLUE, 0.55 * strength))
            axis.text(
                x,
                y,
                _percent(cell["density"]),
                ha="center",
                va="center",
                fontsize=7.5,
                color=INK,
            )
            texts.append(_text(cell, panel))
            places.append((x, y))
        axis.add_collection(
            PatchCollection(boxes, facecolors=colours, edgecolors=to_rgba(MUTED, 0.5))
        )
        axis.set(
            xlim=(-0.6, len(degrees) - 0.4),
            ylim=(len(layers) - 0.4, -0.6),
            title=panel if len(shown) < 3 or panel != SHARED else "shared",
            xlabel="degree l",
        )
        axis.set_xticks(
            range(len(degrees)), ["–" if d < 0 else str(d) for d in degrees]
        )
        axis.set_yticks(range(len(layers)), layers if axis is axes[0] else [])
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.spines[["left", "bottom"]].set_visible(False)
        xs, ys = zip(*places, strict=True)
        points.append(Points(axis, xs, ys, texts))
    axes[0].set_ylabel("layer")
    caption = (
        "Updated entries in percent of those that could be trained, by layer and "
        "degree of the output. Weights with an element axis have a panel for "
        "each element."
    )
    if len(shown) < len(ordered):
        caption += f" Not drawn: {', '.join(ordered[len(shown) :])}."
    return Drawing("Updated paths", caption, figure, points)


def _degree(cell: dict[str, Any]) -> int:
    """Return the degree; -1 for weights without irreps."""
    return -1 if cell["degree"] is None else cell["degree"]


def _percent(share: float) -> str:
    percent = 100 * share
    if 0 < percent < 0.1:
        return "<0.1"
    return f"{percent:.1f}" if 0 < percent < 10 else f"{percent:.0f}"


def _text(cell: dict[str, Any], panel: str) -> str:
    degree = "no irreps" if cell["degree"] is None else f"l = {cell['degree']}"
    return (
        f"layer {cell['layer']}, {degree}, {panel}: {cell['updated']} of "
        f"{cell['alive']} updated ({100 * cell['density']:.2g} %), "
        f"{100 * cell['share']:.2g} % of the change"
    )
