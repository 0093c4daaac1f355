"""Where a result comes from: versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages; missing ones are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str | None:
    """Return the command line of this process; None where Python called the package."""
    program, *arguments = sys.argv
    is_module = Path(program).parts[-2:] == ("pathtune", "__main__.py")
    if not is_module and Path(program).name != "pathtune":
        return None
    return shlex.join(["pathtune", *arguments])


def environment() -> dict[str, Any]:
    """Return what a run's speed and rounding depend on, and how it was started."""
    return {
        "command": command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(
            "pathtune", "torch", "schedulefree", "ase", "numpy", "e3nn", "sevenn"
        ),
    }
