"""Loading a foundation model by name or path, whatever its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pathtune import discovery
from pathtune.backends.base import DTYPES, Backend, ModelInfo
from pathtune.config import validate
from pathtune.deltafile import DeltaFile
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.spin.backend import SpinBackend
from pathtune.spin.config import SpinConfig


def models() -> list[ModelInfo]:
    """List the released models of every backend; imports no vendor."""
    found = (discovery.load("backends", name) for name in discovery.names("backends"))
    return [info for module in found for info in module.Backend.models()]


def licence(model: str) -> str:
    """Return the licence of a released model by name; empty where it is not known."""
    return next((info.licence for info in models() if info.name == model), "")


def load(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    head: str | None = None,
    trust_checkpoint: bool = False,
) -> Backend:
    """Load a foundation model by its released name, or a checkpoint by its path.

    Parameters
    ----------
    model
        E.g. ``7net-0`` (see `models`) or a file.
    dtype
        ``float32`` or ``float64``.
    device
        ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU where there is one.
    head
        Head (modality) of a model that has several.
    trust_checkpoint
        Open a pickled file of unknown hash.

    Raises
    ------
    UsageError
        If name, dtype, device or head do not exist.
    PathtuneError
        If the vendor is not installed or the file cannot be used.
    """
    if dtype not in DTYPES:
        raise UsageError(unknown("dtype", dtype, DTYPES))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used: {reason}") from error
    backend = _backend_of(model)
    if not backend.is_installed():
        raise PathtuneError(
            f"{model} needs {backend.vendor}: pip install 'pathtune[{backend.name}]'"
        )
    return backend.load(
        model,
        dtype=DTYPES[dtype],
        device=device,
        head=head,
        trust_checkpoint=trust_checkpoint,
    )


def _backend_of(model: str) -> type[Backend]:
    """Return the family a released name or a checkpoint's suffix belongs to."""
    backends = [
        discovery.load("backends", name).Backend for name in discovery.names("backends")
    ]
    known = {info.name: b for b in backends for info in b.models()}
    for backend in backends:
        if backend.knows(model):
            return backend
    path = Path(model)
    if path.exists():
        for backend in backends:
            if path.name.endswith(backend.suffixes):
                return backend
        suffixes = ", ".join(s for b in backends for s in b.suffixes)
        raise UsageError(
            f"{model}: the name ends in none of the backends' suffixes ({suffixes})"
        )
    raise UsageError(f"{unknown('model', model, known)} Or give a checkpoint file")


def load_with_delta(
    model: str | Backend, delta: str | Path | DeltaFile | None, **options: Any
) -> tuple[Backend, DeltaFile | None]:
    """Load what is given by name or path; a delta brings its head along.

    Raises
    ------
    UsageError
        If the delta was made for another head; all heads share one base.
    PathtuneError
        If the delta's spin layer is not that of its settings.
    """
    if delta is not None and not isinstance(delta, DeltaFile):
        delta = DeltaFile.load(Path(delta))
    if isinstance(model, str):
        if delta is not None and options.get("head") is None:
            options["head"] = delta.metadata.get("head")
        model = load(model, **options)
    if delta is not None and delta.metadata.get("head", model.head) != model.head:
        raise UsageError(
            f"this delta is for head {delta.metadata['head']!r}, the model was loaded "
            f"with {model.head!r}"
        )
    if delta is not None and delta.layer and not isinstance(model, SpinBackend):
        settings = validate(SpinConfig, delta.metadata["spin"], "spin setting")
        model = SpinBackend(model, settings)
        expected = {n: t.shape for n, t in model.spin_parameters().items()}
        if {n: t.shape for n, t in delta.layer.items()} != expected:
            raise PathtuneError(
                "the spin layer of this delta has not the parameters its settings "
                "imply; the file is damaged, or of another version of pathtune"
            )
    return model, delta
