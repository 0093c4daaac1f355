"""Whether two runs change the same entries, against what chance alone gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathtune.deltafile import Change

Alive = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Overlap:
    """Counts of one parameter in two runs.

    Parameters
    ----------
    alive
        Entries that could be changed in either run.
    first, second, both
        Entries that were.
    """

    alive: int
    first: int
    second: int
    both: int

    @property
    def expected(self) -> float:
        """Entries in both under independent uniform placements."""
        return self.first * self.second / self.alive if self.alive else 0.0


def overlaps(
    first: tuple[Mapping[str, Change], Alive],
    second: tuple[Mapping[str, Change], Alive],
) -> dict[str, Overlap]:
    """Count the overlap of two supports in every parameter that either run touched.

    Parameters
    ----------
    first, second
        Changed entries, and flat indices that could be changed, by parameter.
    """
    found = {}
    empty = np.empty(0, dtype=np.int64)
    for name in sorted({*first[0], *second[0]}):
        a, b = (
            changes[name].indices.numpy() if name in changes else empty
            for changes, _ in (first, second)
        )
        alive = np.union1d(first[1].get(name, empty), second[1].get(name, empty))
        n_alive = len(np.union1d(alive, np.union1d(a, b)))
        both = len(np.intersect1d(a, b, assume_unique=True))
        found[name] = Overlap(n_alive, len(a), len(b), both)
    return found


def jaccard(parts: Iterable[Overlap]) -> dict[str, float | None]:
    """Return the Jaccard index of two supports, its chance level, and the excess.

    Parameters
    ----------
    parts
        Counts of each parameter. Chance keeps the density of each of them, so that
        runs that agree only in how much of each layer changes do not look stable.

    Returns
    -------
    dict
        ``jaccard`` = |A and B| / |A or B|; ``chance``, for one parameter
        p1 p2 / (p1 + p2 - p1 p2) with the densities p; ``corrected`` =
        (jaccard - chance) / (1 - chance), 0 by chance and 1 for equal supports. None
        where undefined: nothing changed, or everything did.
    """
    listed = list(parts)
    both = sum(p.both for p in listed)
    either = sum(p.first + p.second - p.both for p in listed)
    if not either:
        return {"jaccard": None, "chance": None, "corrected": None}
    expected = sum(p.expected for p in listed)
    chance = expected / (sum(p.first + p.second for p in listed) - expected)
    observed = both / either
    excess = (observed - chance) / (1 - chance) if chance < 1 else None
    return {"jaccard": observed, "chance": chance, "corrected": excess}


def stability(
    runs: Sequence[tuple[Mapping[str, Change], Alive]], layers: Mapping[str, str]
) -> dict[str, Any]:
    """Return the Jaccard indices of runs that differ in the seed, averaged over pairs.

    Parameters
    ----------
    runs
        As in `overlaps`; at least two.
    layers
        Parameter -> layer.

    Returns
    -------
    dict
        ``n_runs``, the means of `jaccard` over all pairs, and the same for each
        ``layer`` and each ``parameter``.
    """
    pairs = [overlaps(runs[i], runs[j]) for i in range(len(runs)) for j in range(i)]
    touched = list(dict.fromkeys(name for pair in pairs for name in pair))

    def mean(names: Sequence[str]) -> dict[str, float | None]:
        each = [jaccard(pair[n] for n in names if n in pair) for pair in pairs]
        result: dict[str, float | None] = {}
        for key in ("jaccard", "chance", "corrected"):
            values = [row[key] for row in each if row[key] is not None]
            result[key] = float(np.mean(values)) if values else None  # type: ignore[arg-type]
        return result

    by_layer: dict[str, list[str]] = {}
    for name in touched:
        by_layer.setdefault(layers[name], []).append(name)
    return {
        "n_runs": len(runs),
        **mean(touched),
        "layer": [{"layer": key, **mean(names)} for key, names in by_layer.items()],
        "parameter": [{"parameter": name, **mean([name])} for name in touched],
    }
