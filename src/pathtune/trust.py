"""Which pickled checkpoints may be opened: released ones, our own, and trusted ones.

Unpickling runs code, and every vendor's checkpoint is a pickle. A file is opened
only if its SHA-256 is that of a released model, or stands on the user's own list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import typer

from pathtune import files
from pathtune.errors import PathtuneError


def _list_path() -> Path:
    folder = os.environ.get("PATHTUNE_HOME") or typer.get_app_dir("pathtune")
    return Path(folder) / "trusted.json"


def _trusted() -> dict[str, str]:
    path = _list_path()
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise PathtuneError(f"{path} is damaged ({error}); delete it") from error


def remember(path: Path) -> None:
    """Add a checkpoint that pathtune wrote, or the user vouches for, to the list."""
    path = Path(path)
    listed = _trusted() | {files.sha256(path): path.name}
    files.write_json(_list_path(), listed)


def require(path: Path, released: Collection[str], *, trust: bool = False) -> None:
    """Refuse a checkpoint nobody vouches for.

    Parameters
    ----------
    path
        The pickled checkpoint.
    released
        SHA-256 of the files the vendor has released.
    trust
        The user vouches for this file (``--trust-checkpoint``).

    Raises
    ------
    PathtuneError
        If the file is missing or its hash is unknown.
    """
    if not path.is_file():
        raise PathtuneError(f"{path}: no such checkpoint file")
    digest = files.sha256(path)
    if digest in released or digest in _trusted():
        return
    if not trust:
        raise PathtuneError(
            f"{path} is a pickled checkpoint of unknown origin (sha256 {digest}) and "
            "opening it runs code; if you trust its source, add --trust-checkpoint"
        )
    remember(path)
