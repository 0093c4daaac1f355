"""Errors of predictions against labels, by property; the unit is part of the name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pathtune.properties import Prediction, Property, Structure

# property -> (name in results, factor to the unit of the name)
_NAMES: Mapping[Property, tuple[str, str, float]] = {
    "energy": ("energy", "mev_per_atom", 1e3),
    "forces": ("forces", "mev_per_angstrom", 1e3),
    "stress": ("stress", "mev_per_angstrom3", 1e3),
    "magmoms": ("magmom", "mu_b", 1.0),
}


def _residuals(
    structures: Sequence[Structure], predictions: Sequence[Prediction], name: Property
) -> np.ndarray:
    """Differences prediction - label, flattened; energies per atom."""
    parts = []
    for structure, predicted in zip(structures, predictions, strict=True):
        if name in structure.labels and name in predicted:
            difference = np.asarray(predicted[name]) - structure.labels[name]
            if name == "energy":
                difference = difference / structure.n_atoms
            parts.append(np.ravel(difference))
    return np.concatenate(parts) if parts else np.empty(0)


def errors(
    structures: Sequence[Structure], predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """Return MAE and RMSE of every property that has labels and predictions.

    Energies per atom (meV/atom), forces by component (meV/Å), stress by Voigt
    component (meV/Å^3), moments by component (μ_B).
    """
    result: dict[str, Any] = {"n_structures": len(structures)}
    for name, (label, unit, factor) in _NAMES.items():
        residuals = factor * _residuals(structures, predictions, name)
        if residuals.size:
            result[f"{label}_mae_{unit}"] = float(np.mean(np.abs(residuals)))
            result[f"{label}_rmse_{unit}"] = float(np.sqrt(np.mean(residuals**2)))
    return result


def errors_by_config_type(
    structures: Sequence[Structure], predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    """Return `errors` for each ``config_type``; {} where there is only one."""
    groups: dict[str, list[int]] = {}
    for index, structure in enumerate(structures):
        groups.setdefault(structure.config_type, []).append(index)
    if len(groups) < 2:
        return {}
    return {
        name: errors([structures[i] for i in rows], [predictions[i] for i in rows])
        for name, rows in sorted(groups.items())
    }


def summary(result: Mapping[str, Any]) -> list[str]:
    """Return the MAEs of `errors` for people, e.g. ``["E 1.20 meV/atom", ...]``."""
    shown = {
        "energy_mae_mev_per_atom": "E {:.2f} meV/atom",
        "forces_mae_mev_per_angstrom": "F {:.2f} meV/Å",
        "stress_mae_mev_per_angstrom3": "S {:.2f} meV/Å^3",
    }
    return [text.format(result[key]) for key, text in shown.items() if key in result]
