"""Writing files so that a reader sees the old or the new content, never a part."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pathtune.errors import PathtuneError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that becomes `path` on success.

    The temporary file's name ends like that of `path` (vendors look at the suffix), is
    flushed to the disk before the rename, and is removed when anything goes wrong.

    Raises
    ------
    PathtuneError
        If the folder cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=".", suffix=f".{path.name}", dir=path.parent
        )
    except FileExistsError as error:
        raise PathtuneError(
            f"cannot write {path}: {error.filename} is a file, not a folder"
        ) from error
    except OSError as error:
        raise PathtuneError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise PathtuneError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name and move the result to `path`."""
    with replacing(path) as temporary:
        write(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically.

    Libraries that write files themselves (torch, safetensors) report a full disk as
    errors of their own; serialise to bytes first where that is possible.
    """
    write_atomically(path, lambda p: p.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, keys in the given order."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
