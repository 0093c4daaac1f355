"""Short-range curves: the energy of two atoms against their distance."""

from __future__ import annotations

import numpy as np

from pathtune.report.drawing import BLUE, MUTED, ORANGE, Drawing, Points, canvas
from pathtune.report.run import Run
from pathtune.robustness import DISTANCES

SECTION = "safety"


def draw(run: Run) -> Drawing | None:
    """Draw the dimer curves of the base and of the tuned model."""
    curves = run.short_range
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = canvas(rows, columns, height=0.7 + 1.8 * rows)
    points = []
    for axis, curve in zip(axes, curves, strict=False):
        x = np.array(curve["distances_angstrom"])
        before, after = (np.array(curve[k]) for k in ("base_energy_ev", "energy_ev"))
        core = curve["covalent_angstrom"] * DISTANCES
        axis.axvspan(core[0], core[-1], color=MUTED, alpha=0.15, lw=0)
        axis.plot(x, before, color=ORANGE, ls="--", label="foundation model")
        axis.plot(x, after, color=BLUE, label="fine-tuned")
        deepest = min(before.min(), after.min(), -0.5)
        axis.set_ylim(1.25 * deepest, -2.5 * deepest)
        axis.set(title=curve["pair"])
        texts = [
            f"{curve['pair']} at {d:.2f} Å: {a:.2f} → {b:.2f} eV"
            for d, a, b in zip(x, before, after, strict=True)
        ]
        points.append(Points(axis, x, after, texts))
    for axis in axes[len(curves) :]:
        axis.remove()
    for axis in axes[max(0, len(curves) - columns) : len(curves)]:
        axis.set_xlabel("distance (Å)")
    for axis in axes[: len(curves) : columns]:
        axis.set_ylabel("energy (eV)")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2
    )
    caption = (
        "Two atoms alone, energies relative to the largest distance. In the grey core "
        "they must push each other apart: a hole there lets a simulation collapse. "
        "Shown are the pairs of elements most frequent in the training frames."
    )
    return Drawing("Short range", caption, figure, points)
