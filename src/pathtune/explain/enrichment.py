"""Whether a part of a model holds more of the change than a uniform placement.

Two questions for every group of entries: does it hold more updated entries than chance
(hypergeometric), and more of the squared norm of dW (permutation)?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from pathtune.explain.cells import Cells

CELL = ("layer", "degree", "element")
LEAST_PERMUTATIONS = 1999
#: Numbers drawn in all; above that the permutations' moments stand in for them.
MOST_DRAWS = 10**8
_DRAWS_AT_ONCE = 10**6


def enrichment(
    cells: Cells,
    by: Sequence[str] = CELL,
    *,
    n_permutations: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare the change in every group with a uniform placement over alive entries.

    Parameters
    ----------
    cells
        From `pathtune.explain.cells.measure`; `Cells.where` narrows the universe.
    by
        Keys of a group.
    n_permutations, seed
        Of the permutation test; by default as many as let one group alone pass a false
        discovery rate of 5 %. Where these would draw more than `MOST_DRAWS` numbers, a
        Pearson III with the exact mean, variance and skewness takes their place.

    Returns
    -------
    list of dict
        One for each group with alive entries: the keys; ``alive``, ``updated``;
        ``enrichment`` = (updated / all updated) / (alive / all alive), its one-sided
        hypergeometric ``p_value`` and Benjamini-Hochberg ``q_value``;
        ``energy_enrichment``, the same of the squared norm, with ``energy_p_value``
        and ``energy_q_value``. Empty where nothing changed.

    References
    ----------
    Benjamini and Hochberg, J. R. Stat. Soc. B 57, 289 (1995); Phipson and Smyth, Stat.
    Appl. Genet. Mol. Biol. 9, 39 (2010) for the p-value of a permutation test.
    """
    names, group = cells.groups(by)
    n = len(names)
    alive = np.bincount(group, cells.alive, minlength=n).astype(np.int64)
    updated = np.bincount(group, cells.updated, minlength=n).astype(np.int64)
    square = np.bincount(group, cells.square, minlength=n)
    n_updated = int(updated.sum())
    if not n_updated:
        return []
    kept = np.flatnonzero(alive)
    alive, updated, square = alive[kept], updated[kept], square[kept]
    n_alive = int(alive.sum())
    p = stats.hypergeom.sf(updated - 1, n_alive, n_updated, alive)
    n = n_permutations or max(LEAST_PERMUTATIONS, 40 * len(alive))
    if n * n_updated <= MOST_DRAWS:
        energy_p = permutation_p(square, cells.squares, alive, n, seed)
    else:
        energy_p = moments_p(square, cells.squares, alive)
    q, energy_q = (stats.false_discovery_control(values) for values in (p, energy_p))
    uniform = alive / n_alive
    return [
        {
            **dict(zip(by, names[index], strict=True)),
            "alive": int(alive[i]),
            "updated": int(updated[i]),
            "enrichment": float(updated[i] / n_updated / uniform[i]),
            "p_value": float(p[i]),
            "q_value": float(q[i]),
            "energy_enrichment": float(square[i] / square.sum() / uniform[i]),
            "energy_p_value": float(energy_p[i]),
            "energy_q_value": float(energy_q[i]),
        }
        for i, index in enumerate(kept)
    ]


def permutation_p(
    observed: np.ndarray,
    squares: np.ndarray,
    alive: np.ndarray,
    n_permutations: int,
    seed: int,
) -> np.ndarray:
    """Return P(sum of squares in a group >= observed) under a uniform placement.

    Parameters
    ----------
    observed
        (n_groups,) sum of dW^2 in each group.
    squares
        (n_updated,) dW^2.
    alive
        (n_groups,) entries that could be changed.
    n_permutations, seed
        Of the test.

    Returns
    -------
    array
        (n_groups,) (1 + number at least as large) / (1 + n_permutations).
    """
    generator = np.random.default_rng(seed)
    # A uniform placement is a number of entries in each group, then which of them.
    counts = generator.multivariate_hypergeometric(
        alive, len(squares), size=n_permutations, method="marginals"
    )
    ends = np.cumsum(counts, axis=1)
    at_least = np.ones(len(alive))
    # A sum in another order rounds otherwise.
    bound = observed * (1 - 1e-12)
    at_once = max(1, _DRAWS_AT_ONCE // len(squares))
    for start in range(0, n_permutations, at_once):
        end = ends[start : start + at_once]
        shuffled = generator.permuted(np.tile(squares, (len(end), 1)), axis=1)
        running = np.pad(np.cumsum(shuffled, axis=1), ((0, 0), (1, 0)))
        reached = np.take_along_axis(running, end, axis=1)
        at_least += (np.diff(reached, prepend=0.0, axis=1) >= bound).sum(axis=0)
    return at_least / (1 + n_permutations)


def moments_p(
    observed: np.ndarray, squares: np.ndarray, alive: np.ndarray
) -> np.ndarray:
    """Return `permutation_p` from the distribution's exact first three moments.

    The sum over n of N values drawn without replacement has a known mean, variance and
    skewness; a Pearson III distribution with these stands in for it.

    References
    ----------
    Mielke and Berry, Permutation Methods (Springer, 2007), section 2.3.
    """
    size, n = float(alive.sum()), alive.astype(float)
    # Raw moments: a centred copy of ten million values is worth avoiding.
    mean = squares.sum() / size
    raw = np.einsum("i,i->", squares, squares)
    squared = raw - size * mean**2
    cubed = np.einsum("i,i,i->", squares, squares, squares)
    cubed += 2 * size * mean**3 - 3 * mean * raw
    rest = size - n
    variance = n * rest / (size * (size - 1)) * squared
    third = n * rest * (rest - n) / (size * (size - 1) * (size - 2)) * cubed
    p = np.ones(len(n))
    varies = variance > 0
    spread = np.sqrt(variance[varies])
    score = (observed - n * mean)[varies] / spread
    p[varies] = stats.pearson3.sf(score, third[varies] / spread**3)
    return p


def combined(p_values: Sequence[float]) -> float:
    """Return the p-value of several seeds together (Fisher's method).

    Under a uniform placement the seeds of a run are independent draws.
    """
    smallest = np.finfo(float).tiny
    return float(stats.combine_pvalues(np.maximum(p_values, smallest)).pvalue)
