"""Finding backends and methods: the file's name is the registered name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from pathtune.errors import UsageError, unknown

_NOT_REGISTERED = {"base", "low_rank", "support"}


def names(kind: str) -> list[str]:
    """Return the registered names of a folder of the package.

    Parameters
    ----------
    kind
        ``"backends"`` or ``"methods"``.
    """
    package = importlib.import_module(f"pathtune.{kind}")
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in found if n not in _NOT_REGISTERED)


def load(kind: str, name: str) -> ModuleType:
    """Import the module behind a registered name.

    Raises
    ------
    UsageError
        If no file of that name exists; the nearest match is named.
    """
    if name not in (known := names(kind)):
        raise UsageError(unknown(kind.removesuffix("s"), name, known))
    return importlib.import_module(f"pathtune.{kind}.{name}")
