"""Relaxation of spins at fixed positions, from several starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pathtune.backends.base import Features
from pathtune.errors import UsageError
from pathtune.prediction import moved_to
from pathtune.spin.backend import spins_of
from pathtune.spin.layer import SpinLayer

if TYPE_CHECKING:
    from ase import Atoms

    from pathtune.spin.backend import SpinBackend

# Radians, about: enough to leave a maximum.
TILT = 0.1
# Free magnitudes stay below so many times the longest one given.
LARGEST_GROWTH = 1.5


@dataclass(frozen=True, eq=False)
class RelaxedSpins:
    """What a relaxation has found.

    Parameters
    ----------
    atoms
        A copy of the structure, with the spins of lowest energy as initial moments.
    energy
        Energy without shifts of reference energies (eV).
    torque
        Largest derivative of the energy by the direction of a spin (eV/rad).
    energies
        Energy that each start has led to (eV), the given spins first.
    converged
        Whether each start has converged.
    """

    atoms: Atoms
    energy: float
    torque: float
    energies: tuple[float, ...]
    converged: tuple[bool, ...]


def relax_spins(
    backend: SpinBackend,
    weights: Mapping[str, Tensor],
    atoms: Atoms,
    *,
    magnitudes: Literal["fixed", "free"] = "fixed",
    n_starts: int = 8,
    seed: int = 0,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> RelaxedSpins:
    """Find the spins of lowest energy at fixed positions.

    The first start is the given spins, slightly tilted (a collinear state is a
    stationary point, and may be a maximum); in the others the directions are random.
    Atoms with a spin of zero stay without.

    Parameters
    ----------
    backend
        Model with a spin layer.
    weights
        Of base and layer.
    atoms
        With initial magnetic moments; not modified.
    magnitudes
        Whether the lengths of the spins may change, up to 1.5 times the longest.
    n_starts
        Number of starts; one is the given spins alone.
    seed
        Of the random directions.
    tolerance
        Largest component of the gradient at the end (eV, in units of a spin's length).
    max_steps
        Steps of one start.

    Raises
    ------
    UsageError
        If no atom has a spin, or the layer has no energy.

    Notes
    -----
    Minimised by L-BFGS (SciPy). With fixed magnitudes the unknown is a vector x for
    each spin, s = |s| x/|x|, whose gradient has no component along x.
    """
    if backend.config.spins == "none":
        raise UsageError("a layer with spins: none has no energy of spins to minimise")
    given = spins_of(atoms).numpy()
    lengths = np.linalg.norm(given, axis=1)
    magnetic = np.flatnonzero(lengths > 0)
    if not len(magnetic):
        raise UsageError(
            "no atom has a spin to relax; set initial magnetic moments, e.g. "
            "atoms.set_initial_magnetic_moments([2.0, -2.0])"
        )
    features, layer = backend.landscape(atoms, moved_to(backend, weights))
    landscape = _Landscape(
        replace(
            features,
            energy=features.energy.double(),
            scalars=features.scalars.double(),
            vectors=features.vectors.double(),
        ),
        layer.double(),
        magnetic,
        lengths[magnetic],
        free=magnitudes == "free",
    )
    generator = np.random.default_rng(seed)
    units = given[magnetic] / lengths[magnetic, None]
    tilted = units + TILT * generator.normal(size=units.shape)
    starts = [tilted, *generator.normal(size=(n_starts - 1, *units.shape))]
    found = [
        minimize(
            landscape,
            landscape.start(directions).ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_steps, "gtol": tolerance, "ftol": 1e-16},
        )
        for directions in starts
    ]
    best = min(found, key=lambda result: float(result.fun))
    spins = landscape.spins(torch.from_numpy(best.x)).numpy()
    relaxed = atoms.copy()
    # ASE does not replace scalars by vectors.
    relaxed.arrays.pop("initial_magmoms")
    relaxed.set_initial_magnetic_moments(spins)
    base = float(features.energy.double())
    return RelaxedSpins(
        atoms=relaxed,
        energy=base + float(best.fun),
        torque=landscape.torque(spins),
        energies=tuple(base + float(result.fun) for result in found),
        converged=tuple(bool(np.abs(r.jac).max() <= tolerance) for r in found),
    )


class _Landscape:
    """The energy of the spins and its slope, as a function of free vectors x."""

    def __init__(
        self,
        features: Features,
        layer: SpinLayer,
        magnetic: np.ndarray,
        lengths: np.ndarray,
        *,
        free: bool,
    ) -> None:
        self._features, self._layer, self._free = features, layer, free
        self._magnetic = torch.from_numpy(magnetic)
        self._lengths = torch.from_numpy(lengths).unsqueeze(1)
        self._longest = LARGEST_GROWTH * float(lengths.max())

    def start(self, directions: np.ndarray) -> np.ndarray:
        """Return x of spins with their given lengths."""
        units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        if not self._free:
            return units
        lengths = self._lengths.numpy()
        return lengths * units / np.sqrt(1 - (lengths / self._longest) ** 2)

    def spins(self, x: Tensor) -> Tensor:
        """Return the spins of all atoms."""
        x = x.view(-1, 3)
        square = (x**2).sum(1, keepdim=True)
        if self._free:
            chosen = x * torch.rsqrt(1 + square / self._longest**2)
        else:
            chosen = self._lengths * x * torch.rsqrt(square)
        zeros = x.new_zeros(len(self._features.scalars), 3)
        return zeros.index_add(0, self._magnetic, chosen)

    def __call__(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(values).requires_grad_()
        with torch.enable_grad():
            energy = self._layer(self._features, self.spins(x)).energy.sum()
        (slope,) = torch.autograd.grad(energy, x)
        return float(energy.detach()), slope.numpy()

    def torque(self, spins: np.ndarray) -> float:
        """Return the largest torque on a spin (eV/rad)."""
        s = torch.from_numpy(spins).requires_grad_()
        with torch.enable_grad():
            energy = self._layer(self._features, s).energy.sum()
        (slope,) = torch.autograd.grad(energy, s)
        return float(torch.linalg.cross(s.detach(), slope).norm(dim=1).max())
