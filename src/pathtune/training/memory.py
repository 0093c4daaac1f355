"""Memory: its peak, and an allocator setting that speeds CPU training up."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys

import torch

# Names of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of giving it back to the system.

    A training step allocates and frees hundreds of large buffers; fetching
    zero-filled pages again each time can dominate a step on the CPU. The effect is
    that of the environment variables MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ and
    MALLOC_MMAP_MAX_, without restarting the process. Other C libraries have nothing
    to set.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**28)
    libc.mallopt(_M_MMAP_MAX, 0)


def peak_mib(device: torch.device) -> float:
    """Return the peak memory of the process (CPU) or of the device, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
