"""Errors of predictions against labels, by property; the unit is part of the name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pathtune.properties import (
    PROPERTIES,
    Prediction,
    Structure,
    moment_vectors,
    moments_as_predicted,
)

# quantity -> (name in results, its unit there, factor to that unit)
_NAMES: Mapping[str, tuple[str, str, float]] = {
    "energy": ("energy", "mev_per_atom", 1e3),
    "forces": ("forces", "mev_per_angstrom", 1e3),
    "stress": ("stress", "mev_per_angstrom3", 1e3),
    "magmoms": ("magmom", "mu_b", 1.0),
    "vector": ("magmom_vector", "mu_b", 1.0),
    "magnitude": ("magmom_magnitude", "mu_b", 1.0),
    "angle": ("magmom_angle", "degrees", 1.0),
    "magforces": ("magforces", "mev_per_mu_b", 1e3),
}
#: μ_B; the direction of a smaller moment means little.
SMALLEST_MOMENT = 0.2


def _errors(structure: Structure, predicted: Prediction) -> dict[str, np.ndarray]:
    """Return prediction - label of what has a label; energies per atom.

    Quantities of atoms keep their rows, NaN where an atom has no label.
    """
    labels = structure.labels
    found: dict[str, np.ndarray] = {}
    for name in PROPERTIES:
        if name not in labels or name not in predicted:
            continue
        values, label = np.asarray(predicted[name]), labels[name]
        if name == "magmoms":
            label = moments_as_predicted(moment_vectors(label), values)
            if values.ndim == 2:
                found |= _vector_errors(values, label)
        found[name] = values - label
    if "energy" in found:
        found["energy"] = found["energy"] / structure.n_atoms
    return found


def _vector_errors(predicted: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """Return errors of moments as vectors (n_atoms, 3): length, magnitude, angle.

    Angles are those of atoms whose label is above `SMALLEST_MOMENT`.
    """
    sizes = np.linalg.norm(predicted, axis=1), np.linalg.norm(label, axis=1)
    # Both from the cross and the dot product: arccos alone is blunt at small angles.
    cross = np.linalg.norm(np.cross(predicted, label), axis=1)
    angle = np.degrees(np.arctan2(cross, (predicted * label).sum(axis=1)))
    return {
        "vector": np.linalg.norm(predicted - label, axis=1),
        "magnitude": sizes[0] - sizes[1],
        "angle": np.where(sizes[1] > SMALLEST_MOMENT, angle, np.nan),
    }


def _moments(errors: np.ndarray) -> np.ndarray:
    """Return number, sum of sizes and sum of squares of the errors that exist."""
    there = errors[np.isfinite(errors)]
    return np.array([there.size, np.abs(there).sum(), (there**2).sum()])


class Sums:
    """Running sums of errors: add what was predicted, then ask for the result.

    Sums of parts of the data can be merged, whoever predicted them.
    """

    def __init__(self) -> None:
        self.n_structures = 0
        #: Quantity -> number, sum of sizes and sum of squares of the errors.
        self.sums: dict[str, np.ndarray] = {}
        self.by_config_type: dict[str, Sums] = {}
        #: Of the magnetic quantities.
        self.by_element: dict[str, Sums] = {}

    def add(
        self, structures: Sequence[Structure], predictions: Sequence[Prediction]
    ) -> None:
        """Add predicted structures."""
        for structure, predicted in zip(structures, predictions, strict=True):
            errors = _errors(structure, predicted)
            parts = {name: _moments(error) for name, error in errors.items()}
            own = self.by_config_type.setdefault(structure.config_type, Sums())
            for sums in (self, own):
                sums._add(1, parts)
            magnetic = errors.keys() - {"energy", "forces", "stress"}
            symbols = np.array(structure.atoms.get_chemical_symbols())
            for symbol in np.unique(symbols) if magnetic else ():
                rows = symbols == symbol
                own = self.by_element.setdefault(str(symbol), Sums())
                own._add(1, {name: _moments(errors[name][rows]) for name in magnetic})

    def merge(self, other: Sums) -> None:
        """Add the sums of another part of the data."""
        self._add(other.n_structures, other.sums)
        for name, sums in other.by_config_type.items():
            self.by_config_type.setdefault(name, Sums()).merge(sums)
        for name, sums in other.by_element.items():
            self.by_element.setdefault(name, Sums()).merge(sums)

    def _add(self, n_structures: int, parts: Mapping[str, np.ndarray]) -> None:
        self.n_structures += n_structures
        for name, part in parts.items():
            if part[0]:
                self.sums[name] = self.sums.get(name, 0.0) + part

    def errors(self) -> dict[str, Any]:
        """Return MAE and RMSE of every property that has labels and predictions.

        Energies per atom (meV/atom), forces by component (meV/Å), stress by Voigt
        component (meV/Å^3), moments by component or, where a model predicts those,
        by magnitude (μ_B), magnetic forces by component (meV/μ_B). For moments
        predicted as vectors also the length of the difference, the difference of the
        lengths, and the angle of atoms above `SMALLEST_MOMENT`; then, and with
        magnetic forces, ``by_element`` has the magnetic errors of each element.
        """
        result: dict[str, Any] = {"n_structures": self.n_structures}
        for name, (label, unit, factor) in _NAMES.items():
            if name in self.sums:
                n, size, square = self.sums[name].tolist()
                result[f"{label}_mae_{unit}"] = factor * size / n
                result[f"{label}_rmse_{unit}"] = factor * (square / n) ** 0.5
        if self.by_element and {"vector", "magforces"} & self.sums.keys():
            elements = sorted(self.by_element.items())
            result["by_element"] = {symbol: sums.errors() for symbol, sums in elements}
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
        "magmom_angle_mae_degrees": "angle {:.2f}°",
        "magforces_mae_mev_per_mu_b": "H {:.2f} meV/μ_B",
    }
    return [text.format(result[key]) for key, text in shown.items() if key in result]
