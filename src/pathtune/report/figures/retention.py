"""What was forgotten: the drift from the base on crystals that were no data."""

from __future__ import annotations

from pathtune.report import verdict
from pathtune.report.drawing import BLUE, MUTED, ORANGE, Drawing, Points, canvas
from pathtune.report.run import Run

SECTION = "safety"


def draw(run: Run) -> Drawing | None:
    """Draw the drift of the forces beside their own size, with the verdict's bounds."""
    retention = run.results.get("retention") or {}
    size = retention.get("forces_base_mev_per_angstrom")
    if not size:
        return None
    drift = retention["forces_drift_mev_per_angstrom"]
    figure, (axis,) = canvas(height=1.55)
    values = [drift, size]
    axis.barh([1, 0], values, height=0.62, color=[BLUE, ORANGE])
    for share in (verdict.LITTLE, verdict.MUCH):
        axis.axvline(share * size, color=MUTED, ls=":", lw=1.2)
        axis.annotate(
            f"{100 * share:.0f} %",
            (share * size, 1.45),
            ha="center",
            va="bottom",
            fontsize=7.5,
            annotation_clip=False,
        )
    axis.set_yticks([1, 0], ["change of the forces", "the forces themselves"])
    axis.set(xlabel="mean size of a force component (meV/Å)", ylim=(-0.5, 1.5))
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    n = retention["n_structures"]
    texts = [
        f"{text}: {v:.1f} meV/Å"
        for text, v in zip(
            ("change against the foundation model", "forces of the foundation model"),
            values,
            strict=True,
        )
    ]
    caption = (
        f"{n} crystals of the foundation model's elements that are not in the data. "
        f"Below {100 * verdict.LITTLE:.0f} % counts as little forgotten, above "
        f"{100 * verdict.MUCH:.0f} % as much."
    )
    return Drawing("Retention", caption, figure, [Points(axis, values, [1, 0], texts)])
