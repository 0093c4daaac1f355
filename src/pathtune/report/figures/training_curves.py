"""Training curves: errors on the validation frames, loss, and sparsity."""

from __future__ import annotations

import numpy as np

from pathtune.report.drawing import (
    BLUE,
    MUTED,
    ORANGE,
    Drawing,
    Points,
    canvas,
    logarithmic,
)
from pathtune.report.run import QUANTITIES, Run, mae

SECTION = "training"


def draw(run: Run) -> Drawing | None:
    """Draw errors, loss and the share of updated parameters against the step."""
    if len(run.curve) < 2:
        return None
    steps = [r["step"] for r in run.curve]
    figure, axes = canvas(2, 2, height=4.4)
    points = []

    def line(
        place: int, values: list[float], label: str, unit: str, colour: str
    ) -> None:
        y = np.array(values, float)
        there = np.isfinite(y)
        x, y = np.array(steps)[there], y[there]
        axes[place].plot(x, y, marker="o", ms=2.6, label=label, color=colour)
        texts = [f"step {s}, {label}: {v:.4g}{unit}" for s, v in zip(x, y, strict=True)]
        points.append(Points(axes[place], x, y, texts))

    names = [n for n in run.properties if mae(run.curve[0]["valid"], n) > 0]
    # Energy and forces where there are both.
    for place, name in enumerate(names[:2]):
        unit = QUANTITIES[name].unit
        errors = [mae(r["valid"], name) for r in run.curve]
        line(place, errors, "validation", f" {unit}", BLUE)
        base = mae(run.before, name)
        axes[place].axhline(base, color=ORANGE, ls="--", lw=1.2, zorder=1)
        title = f"{QUANTITIES[name].title} (foundation model: {base:.3g})"
        axes[place].set(title=title, ylabel=f"MAE ({unit})")
    for axis in axes[len(names[:2]) : 2]:
        axis.remove()
    losses = [np.nan if r["train_loss"] is None else r["train_loss"] for r in run.curve]
    line(2, losses, "training", "", MUTED)
    line(2, [r["valid_loss"] for r in run.curve], "validation", "", BLUE)
    axes[2].set(title="Loss", xlabel="step")
    axes[2].legend()
    percent = [100 * (1 - r["sparsity"]["total_sparsity"]) for r in run.curve]
    line(3, percent, "updated", " %", BLUE)
    axes[3].set(title="Updated parameters", ylabel="% of the model", xlabel="step")
    axes[3].set_ylim(0)
    for axis in [*axes[: len(names[:2])], axes[2]]:
        logarithmic(axis)
    for axis in [*axes[: len(names[:2])], *axes[2:]]:
        axis.axvline(run.results["best_step"], color=MUTED, ls=":", lw=1)
    caption = (
        f"On the validation frames. Dashed: the foundation model on the {run.judged} "
        f"frames. Dotted: step {run.results['best_step']}, the one that was kept."
    )
    return Drawing("Training", caption, figure, points)
