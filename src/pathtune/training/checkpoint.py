"""Checkpoints of a run: everything the next step depends on, in one file.

The training iterate is stored as it is, without the optimizer's switch to the average:
writing a checkpoint does not touch the run, and a resumed run is the same run.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from pathtune import files
from pathtune.errors import PathtuneError


def path_in(folder: Path) -> Path:
    """Return where a run folder keeps its checkpoint."""
    return folder / "checkpoints" / "last.pt"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint; a kill at any moment leaves the old or the new one."""
    path = path_in(folder)
    for stray in path.parent.glob(f".*.{path.name}"):  # of a process that was killed
        stray.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_bytes(path, buffer.getvalue())


def read(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint of a run folder, or None where there is none.

    Raises
    ------
    PathtuneError
        If the file is damaged.
    """
    path = path_in(folder)
    if not path.exists():
        return None
    try:
        # Tensors and plain types only: opening a checkpoint runs no code.
        content = torch.load(path, weights_only=True, map_location="cpu")
        if not (isinstance(content, dict) and "identity" in content):
            raise ValueError("not a checkpoint of a run")
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        # PyTorch's own words advise loading the file with weights_only=False.
        raise PathtuneError(
            f"{path} is damaged; delete it to start the run from the beginning"
        ) from error
    return content
