"""Evidence that labels are in other units, or of the other sign, than expected.

Every test compares numbers `y` computed from the labels with numbers `x` that they
should equal, from a base model or from the other labels of the same data, and asks
which unit would explain the ratio. Absolute energies are never used: they depend on
the code and its pseudopotentials. It takes strong evidence to speak: most of the
pairs must agree on one factor, and many more than on the factor one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
from ase.units import Bohr, Hartree, Rydberg, kcal, kJ, mol, nm

from pathtune.properties import GPA, KBAR, Prediction, Property, Structure

PER_ATOM = "eV per atom instead of per structure"

# The size of each unit in the package's own; a negative size is the opposite sign.
UNITS: Mapping[Property, Mapping[str, float]] = {
    "energy": {
        "Hartree": Hartree,
        "Rydberg": Rydberg,
        "kcal/mol": kcal / mol,
        "kJ/mol": kJ / mol,
        "meV": 1e-3,
        "eV with the opposite sign": -1.0,
    },
    "forces": {
        "Hartree/Bohr": Hartree / Bohr,
        "Rydberg/Bohr": Rydberg / Bohr,
        "Hartree/Å": Hartree,
        "kcal/mol/Å": kcal / mol,
        "kJ/mol/Å": kJ / mol,
        "kJ/mol/nm": kJ / mol / nm,
        "meV/Å": 1e-3,
        "eV/Å with the opposite sign (gradients)": -1.0,
    },
    "stress": {
        "GPa": GPA,
        "kbar": KBAR,
        "Hartree/Bohr^3": Hartree / Bohr**3,
        "GPa with the opposite sign": -GPA,
        "kbar with the opposite sign (as VASP prints it)": -KBAR,
        "eV/Å^3 with the opposite sign": -1.0,
    },
}

_MIN_FRAMES = 5  # the components of one frame are no independent evidence
_MIN_PAIRS = 10
_STRONG = 0.7  # share of pairs that a unit must explain
_LEAD = 0.4  # by how much more than the expected unit explains
_FACTOR = 2.0  # a unit explains a pair up to this factor
_MAX_FRAMES = 1000  # per composition, in the quadratic search for neighbours


def suspected_units(
    name: Property,
    structures: Sequence[Structure],
    predictions: Sequence[Prediction],
) -> list[str]:
    """Return the units that explain the labels better than the expected one.

    Parameters
    ----------
    name
        The label: energy, forces or stress.
    structures, predictions
        Equally many; predictions of a base model, empty where there is none.

    Returns
    -------
    list of str
        Keys of `UNITS`, the most likely first; empty where nothing is wrong or the
        predictions prove nothing.
    """
    both = [
        (s, np.asarray(s.labels[name]), np.asarray(p[name]))
        for s, p in zip(structures, predictions, strict=True)
        if name in s.labels and name in p
    ]
    if name == "energy":
        y, x, n = _energy_residuals(both)
    else:
        y = np.concatenate([np.zeros(0), *(label.ravel() for _, label, _ in both)])
        x = np.concatenate([np.zeros(0), *(base.ravel() for _, _, base in both)])
    if len(both) < _MIN_FRAMES or not x.size:
        return []
    informative = np.abs(x) > 0.5 * np.sqrt(np.mean(x**2))
    y, x = y[informative], x[informative]
    expected = {unit: x / size for unit, size in UNITS[name].items()}
    if name == "energy":
        expected[PER_ATOM] = x / n[informative]
    return _explanations(y, x, expected)


def inconsistent_units(structures: Sequence[Structure]) -> list[str]:
    """Return the units that reconcile energies with forces and stresses.

    Between neighbouring frames of one composition the energy changes by the work of
    the forces and the stress, trapezoid rule: ``dE = -F.dR + V stress:strain``.

    Returns
    -------
    list of str
        Such as ``"forces in kcal/mol/Å"``, the most likely first; empty where
        nothing is wrong or the frames are too far apart to prove anything.
    """
    pairs = np.array(list(_neighbours(structures))).reshape(-1, 6)
    y, n, f, s = pairs[:, 0], pairs[:, 1], pairs[:, 2:4], pairs[:, 4:6]
    expected = {f"energy in {u}": (f + s) / size for u, size in UNITS["energy"].items()}
    expected[f"energy in {PER_ATOM}"] = (f + s) / n[:, None]
    expected |= {f"forces in {u}": f * size + s for u, size in UNITS["forces"].items()}
    expected |= {f"stress in {u}": f + s * size for u, size in UNITS["stress"].items()}
    force, stress = np.abs(f).sum(axis=1), np.abs(s).sum(axis=1)
    # A wrong label shows only where it does most of the work.
    for part in (force + stress > 0, force > 3 * stress, stress > 3 * force):
        chosen = {name: values[part] for name, values in expected.items()}
        if units := _explanations(y[part], (f + s)[part], chosen):
            return units
    return []


def is_per_atom(structures: Sequence[Structure]) -> bool:
    """Tell whether energies stay constant while structures grow.

    Compares ``log|E|`` with ``log n_atoms`` among structures of one reduced
    composition: total energies have slope one, energies per atom slope zero.
    """
    groups: dict[bytes, list[tuple[float, float]]] = defaultdict(list)
    for s in structures:
        energy = float(s.labels.get("energy", 0.0))
        if energy:
            _, counts = np.unique(s.atoms.numbers, return_counts=True)
            reduced = counts // np.gcd.reduce(counts)
            species = np.unique(s.atoms.numbers)
            key = np.sign(energy).tobytes() + species.tobytes() + reduced.tobytes()
            groups[key].append((np.log(s.n_atoms), np.log(abs(energy))))
    centred = [np.subtract(g, np.mean(g, axis=0)) for g in groups.values()]
    size, energy = np.concatenate([np.zeros((0, 2)), *centred]).T
    if len(size) < _MIN_PAIRS or np.ptp(size) < np.log(1.5):
        return False
    slope = (size @ energy) / (size @ size)
    return bool(abs(slope) < 0.3 and energy.std() < 0.3 * size.std())


def _explanations(
    y: np.ndarray, x: np.ndarray, expected: Mapping[str, np.ndarray]
) -> list[str]:
    """Return the names whose numbers explain `y`, best first, unless `x` does."""
    needed = max(_STRONG, _share(y, x)[0] + _LEAD)
    if needed > 1:
        return []
    scores = {name: _share(y, values) for name, values in expected.items()}
    strong = {name: d for name, (share, d) in scores.items() if share >= needed}
    best = min(strong.values(), default=0.0)
    close = [name for name, d in strong.items() if d < best + np.log(1.3)]
    return sorted(close, key=strong.__getitem__)


def _share(y: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Return the share of pairs that agree within `_FACTOR`, and by how much."""
    if x.ndim == 2:
        # Where the estimates from the two ends nearly cancel, their mean is noise.
        ends, x = x, x.mean(axis=1)
        keep = np.abs(ends[:, 0] - ends[:, 1]) <= 8 * np.abs(x)
        y, x = y[keep], x[keep]
        keep = np.abs(x) >= np.median(np.abs(x)) if x.size else keep[:0]
        y, x = y[keep], x[keep]
    keep = (x != 0) & (y != 0)
    y, x = y[keep], x[keep]
    if len(y) < _MIN_PAIRS:
        return 0.0, np.inf
    off = np.where(y * x > 0, np.abs(np.log(np.abs(y / x))), np.inf)
    return float(np.mean(off < np.log(_FACTOR))), float(np.median(off))


def _energy_residuals(
    both: Sequence[tuple[Structure, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels and predictions, less what the composition explains, and n_atoms.

    Both are per atom; empty where composition explains nearly all of so few frames.
    """
    numbers = [s.atoms.numbers for s, _, _ in both]
    species = np.unique(np.concatenate([np.zeros(0, int), *numbers]))
    n = np.array([len(z) for z in numbers], dtype=float)
    counts = np.array([(z[:, None] == species).sum(axis=0) for z in numbers])
    energies = np.array([[float(label), float(base)] for _, label, base in both])
    if len(both) <= _MIN_PAIRS:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    fractions, energies = counts / n[:, None], energies / n[:, None]
    fit, _, rank, _ = np.linalg.lstsq(fractions, energies, rcond=None)
    if len(both) - rank < _MIN_PAIRS:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    y, x = (energies - fractions @ fit).T
    return y, x, n


def _neighbours(structures: Sequence[Structure]) -> Iterator[tuple[float, ...]]:
    """Yield dE, n_atoms and the two end-point works of forces and of stress."""
    usable = [
        s
        for s in structures
        if {"energy", "forces"} <= s.labels.keys()
        and abs(np.linalg.det(s.atoms.cell.complete())) > 1e-6
    ]

    def key(s: Structure) -> tuple[bytes, bytes]:
        return s.atoms.numbers.tobytes(), s.atoms.pbc.tobytes()

    for _, members in groupby(sorted(usable, key=key), key=key):
        group = list(members)[:_MAX_FRAMES]
        if len(group) < 2:
            continue
        pbc = group[0].atoms.pbc
        cells = np.array([s.atoms.cell.complete()[:] for s in group])
        scaled = np.array([s.atoms.positions for s in group]) @ np.linalg.inv(cells)
        scaled -= np.round(scaled - scaled[0]) * pbc
        place = np.concatenate([scaled @ cells.mean(axis=0), cells], axis=1)
        place = (place - place.mean(axis=0)).reshape(len(group), -1)
        square = (place**2).sum(axis=1)
        distance = square[:, None] + square - 2 * place @ place.T
        np.fill_diagonal(distance, np.inf)
        nearest = distance.argmin(axis=1).tolist()
        for i, j in sorted({(min(p), max(p)) for p in enumerate(nearest)}):
            a, b = group[i], group[j]
            mean = (cells[i] + cells[j]) / 2
            strain = np.linalg.solve(mean, cells[j] - cells[i])
            strained = np.abs(strain).max() > 1e-9
            if strained and not ("stress" in a.labels and "stress" in b.labels):
                continue
            step = scaled[j] - scaled[i]
            step = (step - np.round(step) * pbc) @ mean
            yield (
                float(b.labels["energy"] - a.labels["energy"]),
                float(a.n_atoms),
                *(-float((s.labels["forces"] * step).sum()) for s in (a, b)),
                *(_work(s, strain) if strained else 0.0 for s in (a, b)),
            )


def _work(s: Structure, strain: np.ndarray) -> float:
    xx, yy, zz, yz, xz, xy = s.labels["stress"]
    stress = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return float(s.atoms.cell.volume * (stress * strain).sum())
