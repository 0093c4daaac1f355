"""Memory: its peak, how much work fits into it, and a setting of the allocator."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from pathtune.errors import PathtuneError, UsageError

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


def _forget_peak(device: torch.device) -> None:
    """Start measuring the peak anew; elsewhere than on Linux it only grows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def limit_mib(device: torch.device, stated_gib: float | None) -> float:
    """Return the memory (MiB) of a pass: 90 % of what was stated, or free on a GPU.

    The rest is for what varies from part to part of a batch.

    Raises
    ------
    UsageError
        On a CPU, where the memory is not ours alone, if nothing was stated.
    """
    if stated_gib is not None:
        return 0.9 * stated_gib * 2**10
    if device.type != "cuda":
        raise UsageError(
            "--max-edges-per-batch auto needs --memory-limit GIB on a CPU: say how "
            "much memory the run may take"
        )
    free, _ = torch.cuda.mem_get_info(device)
    return 0.9 * (free + torch.cuda.memory_reserved(device)) / 2**20


def most_edges(
    compute: Callable[[list[int]], object],
    n_edges: np.ndarray,
    *,
    most: int,
    device: torch.device,
    limit: float,
) -> int:
    """Find how many edges can go through the model at once.

    Passes of the largest frames are computed, each twice as large as the one before,
    until the next one would need more than the limit by linear extrapolation.

    Parameters
    ----------
    compute
        Does what a step does with frames of these numbers; frames may repeat.
    n_edges
        Edges of each frame.
    most
        Number of edges beyond which no pass will ever be.
    device
        Where it is computed.
    limit
        MiB.

    Returns
    -------
    int
        At most `most`, two digits of it.

    Raises
    ------
    PathtuneError
        If the largest frame alone does not fit.
    """
    sizes = np.maximum(n_edges, 1).tolist()
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    largest = edges = sizes[order[0]]
    _forget_peak(device)
    points = [(0, peak_mib(device))]
    while True:
        rows, total = [order[0]], largest
        for i in islice(cycle(order), 1, None):
            if total + sizes[i] > edges:
                break
            rows.append(i)
            total += sizes[i]
        _forget_peak(device)
        try:
            compute(rows)
            peak = peak_mib(device)
        except torch.OutOfMemoryError:
            peak = float("inf")
        if peak > limit:
            break
        points.append((total, peak))
        if edges >= most:
            return most
        edges = min(2 * edges, most)
        (before, low), (now, high) = points[-2:]
        slope = max(high - low, 0.0) / max(now - before, 1)
        if high + slope * (edges - now) > limit:
            return max(largest, _two_digits(int(now + (limit - high) / slope)))
    if len(points) == 1:
        raise PathtuneError(
            f"the largest frame ({largest} edges) alone takes more than the "
            f"{limit:.0f} MiB there are; a smaller model or float32 may fit"
        )
    return max(largest, _two_digits(points[-1][0]))


def _two_digits(number: int) -> int:
    """Round down, so that a second measurement gives the same number more often."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit
