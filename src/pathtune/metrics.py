"""Errors of predictions against labels, by property; the unit is part of the name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pathtune.properties import (
    Prediction,
    Property,
    Structure,
    moment_vectors,
    moments_as_predicted,
)

# property -> (name in results, factor to the unit of the name)
_NAMES: Mapping[Property, tuple[str, str, float]] = {
    "energy": ("energy", "mev_per_atom", 1e3),
    "forces": ("forces", "mev_per_angstrom", 1e3),
    "stress": ("stress", "mev_per_angstrom3", 1e3),
    "magmoms": ("magmom", "mu_b", 1.0),
}


def _error(structure: Structure, values: np.ndarray, name: Property) -> np.ndarray:
    """Return prediction - label of what has a label, flat; energies per atom."""
    label = structure.labels[name]
    if name == "magmoms":
        label = moments_as_predicted(moment_vectors(label), values)
    error = np.ravel(values - label)[np.isfinite(np.ravel(label))]
    return error / structure.n_atoms if name == "energy" else error


class Sums:
    """Running sums of errors: add what was predicted, then ask for the result.

    Sums of parts of the data can be merged, whoever predicted them.
    """

    def __init__(self) -> None:
        self.n_structures = 0
        #: Property -> number, sum of sizes and sum of squares of the errors.
        self.sums: dict[Property, np.ndarray] = {}
        self.by_config_type: dict[str, Sums] = {}

    def add(
        self, structures: Sequence[Structure], predictions: Sequence[Prediction]
    ) -> None:
        """Add predicted structures."""
        for structure, predicted in zip(structures, predictions, strict=True):
            parts = {}
            for name in _NAMES:
                if name in structure.labels and name in predicted:
                    error = _error(structure, np.asarray(predicted[name]), name)
                    if error.size:
                        parts[name] = np.array(
                            [error.size, np.abs(error).sum(), (error**2).sum()]
                        )
            own = self.by_config_type.setdefault(structure.config_type, Sums())
            for sums in (self, own):
                sums._add(1, parts)

    def merge(self, other: Sums) -> None:
        """Add the sums of another part of the data."""
        self._add(other.n_structures, other.sums)
        for name, sums in other.by_config_type.items():
            self.by_config_type.setdefault(name, Sums()).merge(sums)

    def _add(self, n_structures: int, parts: Mapping[Property, np.ndarray]) -> None:
        self.n_structures += n_structures
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + part

    def errors(self) -> dict[str, Any]:
        """Return MAE and RMSE of every property that has labels and predictions.

        Energies per atom (meV/atom), forces by component (meV/Å), stress by Voigt
        component (meV/Å^3), moments by component or, where a model predicts those,
        by magnitude (μ_B).
        """
        result: dict[str, Any] = {"n_structures": self.n_structures}
        for name, (label, unit, factor) in _NAMES.items():
            if name in self.sums:
                n, size, square = self.sums[name].tolist()
                result[f"{label}_mae_{unit}"] = factor * size / n
                result[f"{label}_rmse_{unit}"] = factor * (square / n) ** 0.5
        return result

    def errors_by_config_type(self) -> dict[str, dict[str, Any]]:
        """Return `errors` for each ``config_type``; {} where there is only one."""
        groups = sorted(self.by_config_type.items())
        return {name: s.errors() for name, s in groups} if len(groups) > 1 else {}


def merged(parts: Iterable[Sums]) -> Sums:
    """Return the sums of several parts of the data together."""
    together = Sums()
    for part in parts:
        together.merge(part)
    return together


def errors(
    structures: Sequence[Structure], predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """Return the errors of predicted structures, see `Sums.errors`."""
    sums = Sums()
    sums.add(structures, predictions)
    return sums.errors()


def errors_by_config_type(
    structures: Sequence[Structure], predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    """Return `errors` for each ``config_type``; {} where there is only one."""
    sums = Sums()
    sums.add(structures, predictions)
    return sums.errors_by_config_type()


def summary(result: Mapping[str, Any]) -> list[str]:
    """Return the MAEs of `errors` for people, e.g. ``["E 1.20 meV/atom", ...]``."""
    shown = {
        "energy_mae_mev_per_atom": "E {:.2f} meV/atom",
        "forces_mae_mev_per_angstrom": "F {:.2f} meV/Å",
        "stress_mae_mev_per_angstrom3": "S {:.2f} meV/Å^3",
        "magmom_mae_mu_b": "M {:.3f} μ_B",
    }
    return [text.format(result[key]) for key, text in shown.items() if key in result]
