"""Where a result comes from: versions and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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


def environment() -> dict[str, Any]:
    """Return what a run's speed and rounding depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(
            "pathtune", "torch", "schedulefree", "ase", "numpy", "e3nn", "sevenn"
        ),
    }
