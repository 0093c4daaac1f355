"""Outliers: the frames a tuned model predicts worst."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathtune.properties import Property
from pathtune.report.run import Run

LISTED = 12
#: Times the median error of a frame; errors of one kind rarely spread further.
FACTOR = 3.0


@dataclass(frozen=True)
class Outlier:
    """One badly predicted frame.

    Parameters
    ----------
    frame
        Index in the file.
    formula, config_type
        What it is.
    energy_error
        meV/atom, with its sign; None without a label.
    rmse
        Of the forces (of the energy where there are no forces), fine-tuned.
    rmse_before
        The same of the base.
    worst
        The atom with the largest error, e.g. ``"3 (C)"``; empty without forces.
    is_flagged
        Whether `rmse` is more than `FACTOR` times the median of all frames.
    """

    frame: int
    formula: str
    config_type: str
    energy_error: float | None
    rmse: float
    rmse_before: float
    worst: str
    is_flagged: bool


def by_frame(run: Run) -> tuple[Property, dict[int, float]] | None:
    """Return the property frames are judged by, and its RMSE for each frame.

    Forces, or energies where no frame has forces; None without predictions.
    """
    for name in ("forces", "energy"):
        values = run.values(name)
        if len(values):
            return name, _rmse(values.frame, values.error)
    return None


def _rmse(frame: np.ndarray, error: np.ndarray) -> dict[int, float]:
    frames, owner = np.unique(frame, return_inverse=True)
    mean = np.bincount(owner, error**2) / np.bincount(owner)
    return dict(zip(frames.tolist(), (mean**0.5).tolist(), strict=True))


def listing(run: Run) -> list[Outlier]:
    """Return the `LISTED` worst frames, the worst first."""
    found = by_frame(run)
    if found is None:
        return []
    name, errors = found
    values, energies = run.values(name), run.values("energy")
    before = _rmse(values.frame, values.error_before)
    by_index = dict(zip(energies.frame.tolist(), energies.error.tolist(), strict=True))
    limit = FACTOR * float(np.median(list(errors.values())))
    rows = []
    for index in sorted(errors, key=lambda i: -errors[i])[:LISTED]:
        atoms = run.frames[index][0]
        own = values.frame == index
        atom = int(values.atom[own][np.argmax(np.abs(values.error[own]))])
        rows.append(
            Outlier(
                frame=index,
                formula=atoms.symbols.get_chemical_formula(),
                config_type=run.config_type(index),
                energy_error=by_index.get(index),
                rmse=errors[index],
                rmse_before=before[index],
                worst="" if atom < 0 else f"{atom} ({atoms.symbols[atom]})",
                is_flagged=errors[index] > limit,
            )
        )
    return rows
