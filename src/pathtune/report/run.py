"""A finished run as its folder tells it: results, history, predictions; no model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathtune.config import read_yaml
from pathtune.deltafile import DeltaFile
from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import (
    BY_ATOM,
    GPA,
    PROPERTIES,
    REFERENCE_KEYS,
    Property,
    moment_vectors,
    moments_as_predicted,
)
from pathtune.training.log import read_metrics

if TYPE_CHECKING:
    from ase import Atoms

Record = Mapping[str, Any]

MOST_RECORDS = 80
EXPLANATION = "explain/explain.json"


@dataclass(frozen=True)
class Quantity:
    """How people read a property.

    Parameters
    ----------
    title, component
        Its name, and what one number of it is.
    unit
        That of plots and tables.
    factor
        From the package's unit to this one.
    error
        Name of its mean absolute error in ``metrics.json``.
    """

    title: str
    component: str
    unit: str
    factor: float
    error: str


QUANTITIES: Mapping[Property, Quantity] = {
    "energy": Quantity(
        "Energy", "energy per atom", "meV/atom", 1e3, "energy_mae_mev_per_atom"
    ),
    "forces": Quantity(
        "Forces", "force component", "meV/Å", 1e3, "forces_mae_mev_per_angstrom"
    ),
    "stress": Quantity(
        "Stress", "stress component", "GPa", 1 / GPA, "stress_mae_mev_per_angstrom3"
    ),
    "magmoms": Quantity("Moments", "magnetic moment", "μ_B", 1.0, "magmom_mae_mu_b"),
    "magforces": Quantity(
        "Magnetic forces",
        "magnetic force component",
        "meV/μ_B",
        1e3,
        "magforces_mae_mev_per_mu_b",
    ),
}


def mae(errors: Record, name: Property) -> float:
    """Return the mean absolute error of a property in the unit people read, or NaN.

    Parameters
    ----------
    errors
        Of ``metrics.json``, e.g. its ``test``.
    name
        The property.
    """
    value = float(errors.get(QUANTITIES[name].error, np.nan))
    return value / 1e3 / GPA if name == "stress" else value


@dataclass(frozen=True, eq=False)
class Values:
    """Labels and two predictions of one property, flat; units of `QUANTITIES`.

    Parameters
    ----------
    label, before, after
        (n,) of the reference, the base with re-estimated reference energies, and the
        tuned model; energies per atom.
    frame
        (n,) index of the structure in its file.
    atom
        (n,) index of the atom; -1 for properties of the whole structure.
    """

    label: np.ndarray
    before: np.ndarray
    after: np.ndarray
    frame: np.ndarray
    atom: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @property
    def error_before(self) -> np.ndarray:
        """(n,) base - label."""
        return self.before - self.label

    @property
    def error(self) -> np.ndarray:
        """(n,) tuned - label."""
        return self.after - self.label


class Run:
    """A finished run; files are read when they are asked for.

    Parameters
    ----------
    folder
        Run folder.

    Raises
    ------
    UsageError
        If it holds no finished run.
    PathtuneError
        If a file of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        for name in ("config.yaml", "metrics.json", "delta.safetensors"):
            if not (self.folder / name).is_file():
                raise UsageError(
                    f"{folder} holds no finished run ({name} is missing); give the "
                    "--output folder of pathtune finetune"
                )
        self.results: Record = self._json("metrics.json")
        self.config: Record = read_yaml(self.folder / "config.yaml")

    def _json(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PathtuneError(f"{path} is damaged: {error}") from error

    def _optional(self, name: str, otherwise: Any) -> Any:
        return self._json(name) if (self.folder / name).is_file() else otherwise

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def judged(self) -> str:
        """The part of the data the run is judged on: ``test``, or ``valid``."""
        return "test" if self.results["test"] else "valid"

    @property
    def before(self) -> Record:
        """Errors of the base, reference energies re-estimated."""
        return dict(self.results["zero_shot"])

    @property
    def after(self) -> Record:
        """Errors of the tuned model on the same frames."""
        return dict(self.results[self.judged])

    @property
    def updated_percent(self) -> float:
        """Share of the model's parameters that differ from the base."""
        sparsity = self.results["sparsity"]
        return 100 * sparsity["updated_parameters"] / sparsity["total_parameters"]

    @functools.cached_property
    def history(self) -> Sequence[Record]:
        """The records of ``metrics.jsonl``."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def curve(self) -> Sequence[Record]:
        """The history for drawing: about `MOST_RECORDS` records, and the kept one."""
        every = -(-len(self.history) // MOST_RECORDS) or 1
        best, last = self.results["best_step"], len(self.history) - 1
        return [
            r
            for i, r in enumerate(self.history)
            if i % every == 0 or i == last or r["step"] == best
        ]

    @functools.cached_property
    def environment(self) -> Record:
        """Versions, machine and command line."""
        return dict(self._optional("environment.json", {}))

    @functools.cached_property
    def short_range(self) -> Sequence[Record]:
        """See `pathtune.robustness.curves`."""
        return list(self._optional("short_range.json", []))

    @functools.cached_property
    def explanation(self) -> Record | None:
        """The document of `pathtune.explain`; None where there is none."""
        return self._optional(EXPLANATION, None)

    @functools.cached_property
    def delta(self) -> DeltaFile:
        """The delta file."""
        return DeltaFile.load(self.folder / "delta.safetensors")

    @functools.cached_property
    def frames(self) -> Sequence[tuple[Atoms, Atoms]]:
        """Each judged structure with its tuned and its zero-shot predictions.

        Empty for data that stayed in their file.
        """
        from ase.io import read

        folder = self.folder / "predictions"
        paths = folder / f"{self.judged}.xyz", folder / f"{self.judged}_zero_shot.xyz"
        if not all(path.is_file() for path in paths):
            return []
        tuned, base = (read(path, ":") for path in paths)
        return list(zip(tuned, base, strict=True))

    def values(self, name: Property) -> Values:
        """Return the labels and predictions of one property; empty without any."""
        rows = []
        for index, pair in enumerate(self.frames):
            found = _values(*pair, name)
            if found is not None:
                label, before, after, atom = found
                frame = np.full(len(label), index)
                there = np.isfinite(label)
                rows.append([c[there] for c in (label, before, after, frame, atom)])
        columns = zip(*rows, strict=True) if rows else [[np.empty(0)]] * 5
        label, before, after, frame, atom = (np.concatenate(list(c)) for c in columns)
        factor = QUANTITIES[name].factor
        return Values(
            factor * label,
            factor * before,
            factor * after,
            frame.astype(int),
            atom.astype(int),
        )

    @property
    def properties(self) -> list[Property]:
        """What has labels and predictions in the judged frames."""
        return [name for name in PROPERTIES if QUANTITIES[name].error in self.after]

    @property
    def telling(self) -> list[Property]:
        """The properties whose errors say how good the model is.

        Labelled moments that are the input of a spin layer are not among them.
        """
        spin = self.results.get("spin") or {}
        given = {"magmoms"} if spin.get("spins") == "moments" else set()
        return [name for name in self.properties if name not in given]

    def config_type(self, frame: int) -> str:
        """Return the ``config_type`` (or ``group``) of a judged frame."""
        info = self.frames[frame][0].info
        return str(info.get("config_type", info.get("group", "default")))


def _values(
    tuned: Atoms, base: Atoms, name: Property
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return label, both predictions and the atoms, flat; None where one is missing."""
    keys = REFERENCE_KEYS[name], f"pathtune_{name}"
    label, after = (_content(tuned, key) for key in keys)
    before = _content(base, keys[1])
    if label is None or after is None or before is None:
        return None
    if name == "magmoms":
        label = moments_as_predicted(moment_vectors(label), after)
    n = len(tuned)
    if name == "energy":
        label, before, after = label / n, before / n, after / n
    atom = np.full(label.size, -1)
    if name in BY_ATOM:
        atom = np.repeat(np.arange(n), label.size // n)
    return label.ravel(), before.ravel(), after.ravel(), atom


def _content(atoms: Atoms, key: str) -> np.ndarray | None:
    found = atoms.arrays.get(key, atoms.info.get(key))
    return None if found is None else np.asarray(found, float)
