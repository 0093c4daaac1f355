"""Structures that stay in their file: read when they are asked for, and not kept."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sqlite3
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import ase.db
import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from ase.io.formats import filetype

from pathtune.properties import Structure
from pathtune.structures.survey import Survey, conduct

T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for.

    Parameters
    ----------
    make
        Index -> item.
    n
        Number of items.
    """

    def __init__(self, make: Callable[[int], T], n: int) -> None:
        self._make = make
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[T]:
        return map(self._make, range(self._n))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        chosen = range(self._n)[index]
        if isinstance(chosen, range):
            return [self._make(i) for i in chosen]
        return self._make(chosen)


class Store(Lazy[Structure]):
    """Structures of a file, read one at a time; forked processes can read them too."""

    @functools.cached_property
    def survey(self) -> Survey:
        """The survey of all structures, made in one pass when first needed."""
        return conduct(self)


class Selection(Lazy[Structure]):
    """Some structures of a store, in a given order."""

    def __init__(self, store: Store | Selection, rows: Sequence[int]) -> None:
        chosen = np.asarray(rows, dtype=np.int64)
        super().__init__(lambda i: store[int(chosen[i])], len(chosen))
        self._store, self._rows = store, chosen

    @functools.cached_property
    def survey(self) -> Survey:
        """The store's survey of these structures."""
        return self._store.survey.take(self._rows)


def take(structures: Sequence[Structure], rows: Sequence[int]) -> Sequence[Structure]:
    """Return some structures; those of a store stay in their file."""
    if isinstance(structures, Store | Selection):
        return Selection(structures, rows)
    return [structures[i] for i in rows]


def open_frames(path: Path) -> Lazy[Atoms] | None:
    """Return the frames of a file that gives any of them quickly, else None.

    These are uncompressed extended XYZ files, ASE's SQLite databases and, with
    ``ase-db-backends``, its LMDB databases.
    """
    if path.suffix == ".aselmdb":
        return _lmdb(path)
    kind = filetype(str(path))
    if kind == "db":
        return _sqlite(path)
    if kind == "extxyz" and path.suffix in (".xyz", ".extxyz"):
        return _extended_xyz(path)
    return None


def _sqlite(path: Path) -> Lazy[Atoms]:
    # ASE's own selection fetches all rows at once; their numbers fit in memory.
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT id FROM systems ORDER BY id")
        ids = np.fromiter((number for (number,) in rows), dtype=np.int64)
    # A new connection for every row would leak; processes must not share one.
    opened: dict[int, Any] = {}

    def read(i: int) -> Atoms:
        if (process := os.getpid()) not in opened:
            opened[process] = ase.db.connect(str(path))
            lifetime.enter_context(opened[process])
        return row_atoms(opened[process].get(id=int(ids[i])))

    lifetime = contextlib.ExitStack()
    weakref.finalize(read, lifetime.close)
    return Lazy(read, len(ids))


def _lmdb(path: Path) -> Lazy[Atoms]:
    database = ase.db.connect(str(path), readonly=True)
    ids = np.array(sorted(database.ids), dtype=np.int64)
    return Lazy(lambda i: row_atoms(database.get(id=int(ids[i]))), len(ids))


def row_atoms(row: ase.db.row.AtomsRow) -> Atoms:
    """Return a row's structure with its data and key-value pairs in ``info``."""
    atoms = row.toatoms()
    atoms.info.update(row.data)
    atoms.info.update(row.key_value_pairs)
    return atoms


def _extended_xyz(path: Path) -> Lazy[Atoms]:
    starts = np.fromiter(_starts(path), dtype=np.int64)

    def read(i: int) -> Atoms:
        with open(path, "rb") as file:
            file.seek(starts[i])
            text = file.read(starts[i + 1] - starts[i]).decode()
        return next(read_xyz(io.StringIO(text), 0))

    return Lazy(read, len(starts) - 1)


def _starts(path: Path) -> Iterator[int]:
    """Yield the byte each frame starts at, and where the last one ends."""
    with open(path, "rb") as file:
        position, header = 0, file.readline()
        while header.strip():
            yield position
            position += len(header)
            if not header.strip().isdigit():  # reading the frame says what is wrong
                position = path.stat().st_size
                break
            for _ in range(int(header) + 1):  # the comment and the atoms
                position += len(file.readline())
            header = file.readline()
            while header.lstrip().startswith(b"VEC"):
                position += len(header)
                header = file.readline()
        yield position
