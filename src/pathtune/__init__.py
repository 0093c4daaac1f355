"""pathtune: sparse fine-tuning of E(3)-equivariant interatomic potentials.

The public names are loaded on first use, so that importing the package (and
``pathtune --help``) is instant and needs no backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathtune.api import (
        calculator,
        evaluate,
        finetune,
        load,
        merge,
        models,
        relax_spins,
    )
    from pathtune.config import RunConfig
    from pathtune.deltafile import DeltaFile
    from pathtune.errors import PathtuneError, UsageError
    from pathtune.structures.check import check
    from pathtune.structures.read import read

__version__ = "0.1.0"

_HOMES = {
    "calculator": "api",
    "evaluate": "api",
    "finetune": "api",
    "load": "api",
    "merge": "api",
    "models": "api",
    "relax_spins": "api",
    "RunConfig": "config",
    "DeltaFile": "deltafile",
    "PathtuneError": "errors",
    "UsageError": "errors",
    "check": "structures.check",
    "read": "structures.read",
}

__all__ = [
    "DeltaFile",
    "PathtuneError",
    "RunConfig",
    "UsageError",
    "calculator",
    "check",
    "evaluate",
    "finetune",
    "load",
    "merge",
    "models",
    "read",
    "relax_spins",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pathtune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pathtune.{_HOMES[name]}"), name)
