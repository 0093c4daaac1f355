"""Short-range curves and a short simulation: whether a tuned model is safe to run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols, covalent_radii
from ase.md.verlet import VelocityVerlet
from torch import Tensor

from pathtune import retention
from pathtune.backends.base import Backend
from pathtune.prediction import moved_to, predict
from pathtune.properties import Structure
from pathtune.retention import Predict
from pathtune.structures import Survey

# Shares of the sum of the covalent radii: nearer than any bond, as near as collisions
# in a hot or compressed simulation come.
DISTANCES = np.linspace(0.5, 0.6, 11)
MOST_PAIRS = 200
# The same shares, further out: past the bond and into what is left of it.
CURVE = np.linspace(0.4, 2.0, 33)
MOST_CURVES = 6
N_STEPS = 100
TEMPERATURE = 300.0
#: K; no bond survives it, so something else than the temperature drives the atoms.
EXPLODED = 10_000.0

Pair = tuple[str, str]

_DIRECTION = np.array([1.0, 2.0, 3.0]) / 14**0.5


def pairs(survey: Survey) -> list[Pair]:
    """Return the pairs of elements that occur in one frame, the most frequent first.

    A pair may be of one element; at most `MOST_PAIRS`.
    """
    present = (survey.compositions > 0).astype(int)
    frames = np.bincount(survey.composition, minlength=len(present))
    together = np.triu(present.T @ (frames[:, None] * present))
    first, second = np.nonzero(together)
    order = np.argsort(-together[first, second], kind="stable")[:MOST_PAIRS]
    return [
        (chemical_symbols[first[i] + 1], chemical_symbols[second[i] + 1]) for i in order
    ]


def holes(predict: Predict, pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs whose two atoms attract each other somewhere in the core.

    Parameters
    ----------
    predict
        Predicts forces.
    pairs
        Dimers to look at, at `DISTANCES`.
    """
    dimers = [d for pair in pairs for d in _dimers(pair, DISTANCES)]
    pushes = [p["forces"][1] @ _DIRECTION for p in predict(dimers)]
    by_pair = np.reshape(pushes, (len(pairs), len(DISTANCES)))
    return [p for p, f in zip(pairs, by_pair, strict=True) if not (f > 0).all()]


def curves(
    base: Predict, tuned: Predict, pairs: Sequence[Pair]
) -> list[dict[str, Any]]:
    """Return the energy of two atoms against their distance, before and after.

    Parameters
    ----------
    base, tuned
        Predict energies.
    pairs
        Dimers; the first `MOST_CURVES` are drawn.

    Returns
    -------
    list of dict
        For each pair ``pair`` (e.g. ``"H-O"``), ``covalent_angstrom`` (the sum of the
        covalent radii), ``distances_angstrom``, and ``base_energy_ev`` and
        ``energy_ev``, both relative to the largest distance.
    """
    drawn = pairs[:MOST_CURVES]
    dimers = [d for pair in drawn for d in _dimers(pair, CURVE)]
    shape = (len(drawn), len(CURVE))
    before, after = (
        np.reshape([float(p["energy"]) for p in predict(dimers)], shape)
        for predict in (base, tuned)
    )
    return [
        {
            "pair": "-".join(pair),
            "covalent_angstrom": float(_covalent(pair)),
            "distances_angstrom": (_covalent(pair) * CURVE).tolist(),
            "base_energy_ev": (old - old[-1]).tolist(),
            "energy_ev": (new - new[-1]).tolist(),
        }
        for pair, old, new in zip(drawn, before, after, strict=True)
    ]


def _covalent(pair: Pair) -> float:
    return float(sum(covalent_radii[Atoms(pair).numbers]))


def _dimers(pair: Pair, shares: np.ndarray) -> list[Structure]:
    """Return two atoms at shares of the sum of their covalent radii."""
    distances = _covalent(pair) * shares
    return [
        Structure(Atoms(pair, [np.zeros(3), distance * _DIRECTION]))
        for distance in distances
    ]


def nve(
    atoms: Atoms, calculator: Calculator, *, n_steps: int, seed: int = 0
) -> dict[str, Any]:
    """Run a short simulation at constant energy from 300 K.

    Parameters
    ----------
    atoms
        Where it starts; not modified.
    calculator
        Of energies and forces.
    n_steps
        Of 0.5 fs where there is hydrogen, of 1 fs elsewhere.
    seed
        Of the velocities.

    Returns
    -------
    dict
        ``n_atoms``, ``n_steps`` done, ``time_step_fs``; ``exploded``: whether the
        kinetic energy reached that of 10 000 K or became no number, which ends the
        run; ``energy_drift_mev_per_atom_per_ps``: slope of the total energy, None
        after an explosion.
    """
    atoms = atoms.copy()
    atoms.set_constraint()
    atoms.calc = calculator
    time_step = 0.5 if "H" in atoms.symbols else 1.0
    masses = atoms.get_masses()[:, None]
    velocities = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    velocities *= np.sqrt(units.kB * TEMPERATURE / masses)
    velocities -= (masses * velocities).sum(axis=0) / masses.sum()
    atoms.set_velocities(velocities)
    dynamics = VelocityVerlet(atoms, timestep=time_step * units.fs)
    energies: list[float] = []
    exploded = False
    for _ in dynamics.irun(n_steps):
        energies.append(atoms.get_total_energy() / len(atoms))
        exploded = not (
            atoms.get_temperature() < EXPLODED and np.isfinite(energies[-1])
        )
        if exploded:
            break
    times = 1e-3 * time_step * np.arange(len(energies))
    drift = None if exploded else 1e3 * float(np.polyfit(times, energies, 1)[0])
    return {
        "n_atoms": len(atoms),
        "n_steps": len(energies) - 1,
        "time_step_fs": time_step,
        "exploded": exploded,
        "energy_drift_mev_per_atom_per_ps": drift,
    }


class Potential(Calculator):
    """A calculator of what a model of this package predicts."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012, as ASE has it

    def __init__(self, predict: Predict) -> None:
        super().__init__()
        self._predict = predict

    def calculate(self, *args: Any, **options: Any) -> None:
        """Predict; called by ASE."""
        super().calculate(*args, **options)
        (predicted,) = self._predict([Structure(self.atoms)])
        energy, forces = float(predicted["energy"]), predicted["forces"]
        self.results = {"energy": energy, "forces": forces}


def _predicting(backend: Backend, weights: Mapping[str, Tensor]) -> Predict:
    return functools.partial(
        predict,
        backend,
        weights=moved_to(backend, weights),
        properties=("energy", "forces"),
    )


def short_range(
    backend: Backend, weights: Mapping[str, Tensor], train: Survey
) -> list[dict[str, Any]]:
    """Return `curves` of the most frequent pairs of elements in the training frames."""
    base, tuned = _predicting(backend, {}), _predicting(backend, weights)
    return curves(base, tuned, pairs(train))


def measure(
    backend: Backend,
    weights: Mapping[str, Tensor],
    *,
    size: str,
    train: Survey,
    held_out: Sequence[Structure],
    sizes: np.ndarray,
) -> dict[str, Any]:
    """Return ``retention`` of ``metrics.json``.

    Parameters
    ----------
    backend
        The base.
    weights
        Merged parameters; reference energies are not shifted.
    size
        Of the retention set, see `pathtune.retention.SIZES`.
    train
        Survey of the training frames; the pairs of elements are theirs.
    held_out
        The simulation starts from the frame of median size, lone atoms apart.
    sizes
        (n_held_out,) their numbers of atoms.

    Returns
    -------
    dict
        That of `pathtune.retention.drift`; ``dimers``: number of pairs, shares of them
        with a hole in the base and in the tuned model, and those that only the tuned
        one has; ``nve``: that of `nve`, None without a frame to start from.
    """
    base, tuned = _predicting(backend, {}), _predicting(backend, weights)
    crystals = retention.prototypes(backend.elements, retention.SIZES[size])
    looked_at = pairs(train)
    before, after = holes(base, looked_at), holes(tuned, looked_at)
    ordered = np.argsort(sizes, kind="stable")
    ordered = ordered[sizes[ordered] > 1]
    simulated = None
    if len(ordered):
        start = held_out[int(ordered[len(ordered) // 2])]
        simulated = nve(start.atoms, Potential(tuned), n_steps=N_STEPS)
    return {
        **retention.drift([Structure(atoms) for atoms in crystals], base, tuned),
        "dimers": {
            "n_pairs": len(looked_at),
            "base_hole_fraction": len(before) / len(looked_at),
            "hole_fraction": len(after) / len(looked_at),
            "new_holes": ["-".join(pair) for pair in after if pair not in before],
        },
        "nve": simulated,
    }
