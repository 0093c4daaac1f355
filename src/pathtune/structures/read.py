"""Reading labelled structures from files, and writing them back with predictions."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_xyz
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from pathtune import files
from pathtune.config import STREAM_ABOVE
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.properties import (
    PARTIAL,
    PROPERTIES,
    REFERENCE_KEYS,
    REFERENCE_VIRIALS_KEY,
    Prediction,
    Property,
    Structure,
)
from pathtune.structures.store import Lazy, Store, open_frames, row_atoms
from pathtune.structures.survey import survey

# What ASE's readers raise for a file that is not what its name says: XML parse
# errors are SyntaxErrors, a header without atoms ends in a RuntimeError.
_READER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SyntaxError,
    ImportError,
    StopIteration,
    sqlite3.Error,
    struct.error,
    zlib.error,
    ase.io.ParseError,
    UnknownFileTypeError,
)
_SEARCH_ORDER: Mapping[Property, tuple[str, ...]] = {
    "energy": (REFERENCE_KEYS["energy"], "free_energy", "energy"),
    "forces": (REFERENCE_KEYS["forces"], "forces"),
    "stress": (REFERENCE_KEYS["stress"], REFERENCE_VIRIALS_KEY, "stress"),
    "magmoms": (REFERENCE_KEYS["magmoms"], "magmoms"),
    "magforces": (REFERENCE_KEYS["magforces"], "magforces", "magnetic_forces"),
}
_STEMS: Mapping[Property, tuple[str, ...]] = {
    "energy": ("energ",),
    "forces": ("forc", "grad"),
    "stress": ("stress", "viri"),
    "magmoms": ("mag", "spin"),
    "magforces": ("magforc", "magnetic_forc", "spin_forc", "force_mag"),
}
_GEOMETRY = {"numbers", "positions", "initial_magmoms", "initial_charges", "tags"}
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
_MIN_VOLUME = 1e-6  # Å^3


def read(
    path: str | os.PathLike[str],
    *,
    keys: Mapping[Property, str] | None = None,
    allow_unlabelled: bool = False,
    stream_above: float = STREAM_ABOVE,
) -> Sequence[Structure]:
    """Read every frame of a file and the labels it carries.

    For each property one key is chosen for the whole file, so that two levels of
    theory are never mixed: the key the user names, else the first key of the list
    ``REF_<property>`` (for the stress then ``REF_virials``), ``<property>`` of the
    calculator that ASE attaches, that any frame has. Of a calculator's energies the
    free energy is preferred where every frame has it, because the forces are its
    derivative. A key with "virial" in its name holds virials: stress is minus the
    virial (eV) over the volume. A frame without the chosen key has no such label, nor
    has an atom whose moment or magnetic force is NaN.

    Parameters
    ----------
    path
        Any file ASE reads: extended XYZ (also ``.gz``), ASE database, trajectory,
        VASP ``OUTCAR`` or ``vasprun.xml``.
    keys
        Keys of ``info`` or ``arrays`` to use instead of the search, by property.
    allow_unlabelled
        Accept a file without any label, e.g. to predict on it.
    stream_above
        Size (MiB) above which the structures of an extended XYZ file or an ASE
        database stay in the file and are read each time they are asked for.

    Returns
    -------
    sequence of Structure
        In file order; units and shapes as in `pathtune.properties`. A list, or a
        `Store` where the structures stay in the file.

    Raises
    ------
    UsageError
        If `keys` names a property that does not exist.
    PathtuneError
        If the file cannot be read, holds no structure or no label, lacks a key named
        by the user, or has a label that cannot be one.
    """
    path, keys = Path(path), dict(keys or {})
    for name in keys:
        if name not in PROPERTIES:
            raise UsageError(unknown("property", name, PROPERTIES))
    frames = _frames(path, stream_above)
    patterns = {frozenset(_sources(a)) for a in frames}
    found = sorted(frozenset().union(*patterns) - _GEOMETRY)
    chosen: dict[Property, str] = {}
    for name in PROPERTIES:
        key = keys.get(name) or _search(patterns, name)
        if key is not None and any(key in pattern for pattern in patterns):
            chosen[name] = key
        elif name in keys:
            raise PathtuneError(_missing(path, name, keys.get(name), found))
    if not chosen and not allow_unlabelled:
        raise PathtuneError(
            f"{path}: no frame has a label; looked for the keys "
            f"{', '.join(k for order in _SEARCH_ORDER.values() for k in order)}; "
            f"the file has {_listing(found)}.{_suggest(PROPERTIES, found)}"
        )
    store = Store(
        lambda i: _structure(frames[i], chosen, f"{path.name}:{i}"), len(frames)
    )
    return store if isinstance(frames, Lazy) else list(store)


def label_counts(structures: Sequence[Structure]) -> dict[Property, int]:
    """Return how many structures carry each label, for all properties."""
    return survey(structures).counts


def fingerprint(structures: Sequence[Structure]) -> str:
    """Return the SHA-256 of species, positions, cells, periodicity and labels.

    The order of the structures matters; file names, tags and weights do not.
    """
    return survey(structures).fingerprint


def write_predictions(
    path: str | os.PathLike[str],
    structures: Iterable[Structure],
    predictions: Iterable[Prediction],
) -> None:
    """Write structures, their labels and predictions to an extended XYZ file.

    Labels are written under ``REF_*``, predictions both as the results ASE attaches
    to the atoms and under ``pathtune_*``. The file appears complete or not at all.

    Parameters
    ----------
    path
        Target; a suffix like ``.gz`` compresses it.
    structures, predictions
        Equally many; units and shapes as in `pathtune.properties`.

    Raises
    ------
    ValueError
        If the numbers of structures and predictions differ.
    PathtuneError
        If the file cannot be written.
    """
    with (
        files.replacing(Path(path)) as temporary,
        open_with_compression(str(temporary), "w") as file,
    ):
        for s, prediction in zip(structures, predictions, strict=True):
            write_xyz(file, [_with_predictions(s, prediction)])


def _with_predictions(s: Structure, prediction: Prediction) -> Atoms:
    """Return a structure with its labels and predictions."""
    atoms = s.atoms.copy()
    atoms.info = {
        k: v
        for k, v in atoms.info.items()
        if k not in all_properties and not isinstance(v, dict)
    }
    labels = {REFERENCE_KEYS[k]: v for k, v in s.labels.items()}
    tagged = {f"pathtune_{k}": v for k, v in prediction.items()}
    for key, value in (labels | tagged).items():
        value = np.asarray(value, float)
        if value.ndim and key.endswith(("forces", "magmoms")):
            atoms.set_array(key, value)
        else:
            atoms.info[key] = value if value.ndim else float(value)
    atoms.calc = SinglePointCalculator(
        atoms,
        **{
            k: v if np.ndim(v) else float(v)
            for k, v in prediction.items()
            if k in all_properties
        },
    )
    return atoms


def _frames(path: Path, stream_above: float) -> Sequence[Atoms]:
    """Return all frames: in memory, or where to find them in a large file."""
    if path.is_dir():
        raise PathtuneError(f"{path} is a directory; name the file inside it")
    if not path.is_file():
        raise PathtuneError(f"{path} does not exist; check the path of the data file")
    with _reading(path, ()):
        stored = open_frames(path)
    found: list[Atoms] = []
    if stored is None:
        with _reading(path, found):
            for atoms in _in_order(path):
                found.append(atoms)
    elif path.stat().st_size > stream_above * 2**20 and len(stored):
        return _named(path, stored)
    else:
        found.extend(_named(path, stored))
    if not found:
        raise PathtuneError(f"{path} holds no structure; check the file")
    return found


def _named(path: Path, stored: Sequence[Atoms]) -> Lazy[Atoms]:
    """Return the same frames; one that cannot be read is named."""

    def read_one(i: int) -> Atoms:
        with _reading(path, range(i)):
            return stored[i]

    return Lazy(read_one, len(stored))


def _in_order(path: Path) -> Iterator[Atoms]:
    """Yield the frames of a file that has to be read from its beginning."""
    if filetype(str(path)) == "json":
        with ase.db.connect(str(path)) as database:
            yield from map(row_atoms, database.select())
    else:
        yield from ase.io.iread(path, index=":")


@contextlib.contextmanager
def _reading(path: Path, before: Collection[object]) -> Iterator[None]:
    """Turn every failure of ASE's readers into one sentence on the frame after some."""
    try:
        yield
    except _READER_ERRORS as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"unknown species or key {reason}"
        raise PathtuneError(
            f"{path}:{len(before)}: ASE cannot read this frame ({reason}); check that "
            "the file is complete and in the format its name says"
        ) from error


def _sources(atoms: Atoms) -> dict[str, Any]:
    results = atoms.calc.results if atoms.calc else {}
    return {**results, **atoms.arrays, **atoms.info}


def _search(patterns: Collection[frozenset[str]], name: Property) -> str | None:
    for key in _SEARCH_ORDER[name]:
        if not any(key in found for found in patterns):
            continue
        if key == "free_energy" and any(
            "energy" in found and key not in found for found in patterns
        ):
            continue
        return key
    return None


def _missing(path: Path, name: Property, key: str | None, found: list[str]) -> str:
    looked = repr(key) if key else ", ".join(_SEARCH_ORDER[name])
    return (
        f"{path}: no frame has {name} under {looked}; the file has {_listing(found)}."
        f"{_suggest((name,), found, key)}"
    )


def _listing(found: Sequence[str]) -> str:
    return f"the keys {', '.join(found)}" if found else "no further keys"


def _suggest(
    names: Sequence[Property], found: Sequence[str], key: str | None = None
) -> str:
    """Name the key of the file most like the one that was looked for."""
    for name in names:
        stems = _STEMS[name]
        alike = [k for k in found if any(stem in k.lower() for stem in stems)]
        for wanted in (key, *_SEARCH_ORDER[name]):
            close = get_close_matches(wanted or "", alike or found, n=1)
            if close or (alike and wanted):
                match = close[0] if close else alike[0]
                return f" Did you mean {match!r}? Name it as the key of the {name}."
    return ""


def _structure(atoms: Atoms, chosen: Mapping[Property, str], where: str) -> Structure:
    if not len(atoms):
        raise PathtuneError(f"{where}: the frame has no atoms; remove it")
    if 0 in atoms.numbers:
        raise PathtuneError(
            f"{where}: atom {int(np.argmin(atoms.numbers))} has the symbol 'X', which "
            "is no element; write the chemical symbol"
        )
    for what, array in (("position", atoms.positions), ("cell", atoms.cell[:])):
        if not np.isfinite(array).all():
            raise PathtuneError(f"{where}: a {what} is not finite; remove the frame")
    sources = _sources(atoms)
    labels = {
        name: _label(name, sources[key], "virial" in key.lower(), atoms, where)
        for name, key in chosen.items()
        if key in sources
    }
    labels = {name: x for name, x in labels.items() if not np.isnan(x).all()}
    weights = {
        name: _weight(sources, f"config_{name}_weight", where)
        for name in PROPERTIES
        if f"config_{name}_weight" in sources
    }
    clean = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if atoms.has("initial_magmoms"):
        clean.set_initial_magnetic_moments(atoms.get_initial_magnetic_moments())
    used = set(chosen.values())
    clean.info = {k: v for k, v in atoms.info.items() if k not in used}
    return Structure(
        atoms=clean,
        labels=labels,
        weight=_weight(sources, "config_weight", where),
        property_weights=weights,
        config_type=str(
            atoms.info.get("config_type", atoms.info.get("group", "default"))
        ),
        source=where,
        label_keys={name: chosen[name] for name in labels},
    )


def _label(
    name: Property, value: Any, is_virial: bool, atoms: Atoms, where: str
) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PathtuneError(
            f"{where}: {name} {value!r} is not a number; correct it or leave it out"
        ) from error
    unlabelled = np.isnan(array) & (name in PARTIAL)
    if not (np.isfinite(array) | unlabelled).all():
        raise PathtuneError(
            f"{where}: {name} is not finite (NaN or infinite); leave the key out where "
            "there is no label"
        )
    n = len(atoms)
    allowed: tuple[tuple[int, ...], ...] = {
        "energy": ((), (1,)),
        "forces": ((n, 3),),
        "stress": ((3, 3), (9,), (6,)),
        "magmoms": ((n,), (n, 3)),
        "magforces": ((n, 3),),
    }[name]
    if array.shape not in allowed:
        raise PathtuneError(
            f"{where}: {name} has shape {array.shape}, expected "
            f"{' or '.join(map(str, allowed))} for {n} atoms; check the columns"
        )
    if name == "energy":
        return array.reshape(())
    return _stress(array, is_virial, atoms, where) if name == "stress" else array


def _stress(array: np.ndarray, is_virial: bool, atoms: Atoms, where: str) -> np.ndarray:
    volume = atoms.cell.volume
    if volume < _MIN_VOLUME:
        raise PathtuneError(
            f"{where}: the frame has a stress or virial label but a cell without "
            "volume; add the cell or leave the label out"
        )
    if is_virial:
        array = -array / volume
    if array.shape == (6,):
        return array
    full = array.reshape(3, 3)
    # Data sets carry rounding noise of 1e-5 eV/Å^3 between the two triangles.
    if np.abs(full - full.T).max() > max(1e-4, 1e-2 * np.abs(full).max()):
        raise PathtuneError(
            f"{where}: the stress is not symmetric; check the order of its components"
        )
    full = (full + full.T) / 2
    return np.array([full[i, j] for i, j in _VOIGT])


def _weight(sources: Mapping[str, Any], key: str, where: str) -> float:
    value = sources.get(key, 1.0)
    try:
        weight = float(cast(float, value))
    except (TypeError, ValueError) as error:
        raise PathtuneError(f"{where}: {key} {value!r} is not a number") from error
    if not (np.isfinite(weight) and weight >= 0):
        raise PathtuneError(
            f"{where}: {key} is {weight}, expected a number that is zero or positive"
        )
    return weight
