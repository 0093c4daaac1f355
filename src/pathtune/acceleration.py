"""The vendors' accelerated kernels, used only where they keep the predictions.

Weights are merged first and the model is converted afterwards. Conversions are known to
change predictions silently, so each is compared on structures of the model's elements.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pathtune.backends.base import Backend
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.merging import samples
from pathtune.properties import Prediction, Property, Structure

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

# eV/atom, eV/Å, eV/Å^3: float32 kernels sum in another order.
LIMITS: Mapping[Property, float] = {"energy": 1e-5, "forces": 1e-4, "stress": 1e-5}


def calculator(
    backend: Backend,
    weights: Mapping[str, Tensor],
    shifts: Mapping[str, float],
    accelerator: str | None,
) -> Calculator:
    """Return the vendor's calculator with merged weights, plain or accelerated.

    Parameters
    ----------
    backend
        The base.
    weights, shifts
        As for `Backend.calculator`.
    accelerator
        One of `Backend.accelerators`, or None.

    Raises
    ------
    UsageError
        If the family does not offer it.
    PathtuneError
        If its package is missing, the conversion fails, or the converted model differs
        from the plain one.
    """
    plain = backend.calculator(weights, shifts)
    if accelerator is None:
        return plain
    if accelerator not in backend.accelerators:
        if not backend.accelerators:
            raise UsageError(f"{backend.name} has no accelerator in its calculator")
        raise UsageError(unknown("accelerator", accelerator, backend.accelerators))
    package = backend.accelerators[accelerator]
    if importlib.util.find_spec(package) is None:
        raise PathtuneError(f"{accelerator} needs {package}, which is not installed")
    try:
        fast = backend.accelerated(weights, shifts, accelerator)
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PathtuneError(
            f"{backend.model_name} cannot be converted to {accelerator}: {reason[0]}"
        ) from error
    symbols = sorted(shifts) or [s for s in ("H", "O", "Cu") if s in backend.elements]
    checked = samples(backend, symbols or backend.elements[:3])
    _compare(accelerator, *(list(predictions(c, checked)) for c in (plain, fast)))
    return fast


def predictions(
    calculator: Calculator, structures: Iterable[Structure]
) -> Iterable[Prediction]:
    """Yield what an ASE calculator says of structures, one by one."""
    for structure in structures:
        atoms = structure.atoms.copy()
        atoms.calc = calculator
        predicted: dict[Property, np.ndarray] = {
            "energy": np.asarray(atoms.get_potential_energy()),
            "forces": atoms.get_forces(),
        }
        if atoms.cell.rank == 3:
            predicted["stress"] = atoms.get_stress()
        yield predicted


def _compare(
    accelerator: str, plain: Sequence[Prediction], fast: Sequence[Prediction]
) -> None:
    """Refuse a converted model that predicts something else."""
    for a, b in zip(plain, fast, strict=True):
        for name, value in a.items():
            scale = len(a["forces"]) if name == "energy" else 1
            difference = float(np.abs(np.asarray(b[name]) - value).max()) / scale
            rounding = 8 * float(np.abs(value).max()) * 2**-24 / scale
            if not difference <= LIMITS[name] + rounding:
                raise PathtuneError(
                    f"{accelerator} changes the {name} by {difference:.1e} (allowed "
                    f"{LIMITS[name]:.0e}); go on without --accelerator"
                )
