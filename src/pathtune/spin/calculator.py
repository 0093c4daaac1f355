"""An ASE calculator of a model with a spin layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ase.calculators.calculator import Calculator, all_changes
from torch import Tensor

from pathtune.prediction import moved_to, predict
from pathtune.properties import Structure

if TYPE_CHECKING:
    from ase import Atoms

    from pathtune.spin.backend import SpinBackend


class SpinCalculator(Calculator):
    """Energy, forces, stress, moments and magnetic forces of base and spin layer.

    The spins are the initial magnetic moments of the Atoms object; change them and the
    next call sees it. ``results`` has ``magmoms``, (n_atoms, 3) μ_B or magnitudes
    (n_atoms,) where the layer knows nothing of spins, and ``magnetic_forces``,
    (n_atoms, 3) eV/μ_B: minus the derivative of the energy with respect to the spins at
    fixed positions.

    Parameters
    ----------
    backend
        The model.
    weights, shifts
        As for `pathtune.prediction.predict`.
    """

    implemented_properties = [  # noqa: RUF012, as ASE has it
        *("energy", "free_energy", "forces", "stress", "magmoms", "magnetic_forces")
    ]

    def __init__(
        self,
        backend: SpinBackend,
        weights: Mapping[str, Tensor],
        shifts: Mapping[str, float],
    ) -> None:
        super().__init__()
        self._backend, self._shifts = backend, dict(shifts)
        self._weights = moved_to(backend, weights)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Predict everything at once; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        (found,) = predict(
            self._backend,
            [Structure(self.atoms)],
            weights=self._weights,
            shifts=self._shifts,
        )
        results: dict[str, Any] = {str(name): value for name, value in found.items()}
        results["energy"] = results["free_energy"] = float(results["energy"])
        if "magforces" in results:
            results["magnetic_forces"] = results.pop("magforces")
        self.results = results
