"""Setting aside part of the data for validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from pathtune.errors import PathtuneError, UsageError

T = TypeVar("T")


def split_validation(
    structures: Sequence[T], fraction: float = 0.1, *, seed: int
) -> tuple[list[T], list[T]]:
    """Split at random into a training and a validation part.

    Parameters
    ----------
    structures
        At least two; or their numbers.
    fraction
        Share of the structures to validate on, between 0 and 1; at least one
        structure goes to each part.
    seed
        The same seed gives the same split.

    Returns
    -------
    train, valid
        Both in the order of `structures`.

    Raises
    ------
    UsageError
        If `fraction` is not between 0 and 1.
    PathtuneError
        If there are fewer than two structures.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"validation fraction {fraction} is not between 0 and 1; use e.g. 0.1"
        )
    n = len(structures)
    if n < 2:
        raise PathtuneError(
            f"cannot split {n} structure(s) into training and validation; provide at "
            "least 2, or a validation file"
        )
    n_valid = min(max(1, round(fraction * n)), n - 1)
    chosen = set(np.random.default_rng(seed).permutation(n)[:n_valid].tolist())
    return (
        [s for i, s in enumerate(structures) if i not in chosen],
        [s for i, s in enumerate(structures) if i in chosen],
    )
