"""Plain twins of the explanation's equations, entry by entry."""

from __future__ import annotations

import math


def one_minus_r2(weights, changes):
    """1 - R^2 of W + dW on W: |dW|^2 / sum (W - mean W)^2."""
    mean = sum(weights) / len(weights)
    residual = total = 0.0
    for w, d in zip(weights, changes, strict=True):
        residual += d * d
        total += (w - mean) ** 2
    return residual / total


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def at_least(k, n_alive, n_updated, n_group):
    """P(X >= k) where X of n_updated draws without replacement fall in a group."""
    total = math.comb(n_alive, n_updated)
    hits = range(k, min(n_group, n_updated) + 1)
    return sum(
        math.comb(n_group, x) * math.comb(n_alive - n_group, n_updated - x) / total
        for x in hits
    )


def chance_jaccard(p1, p2):
    """Jaccard index of two independent uniform supports of densities p1 and p2."""
    return p1 * p2 / (p1 + p2 - p1 * p2)


def benjamini_hochberg(p_values):
    """q_i = min over p_j >= p_i of p_j m / rank_j, at most 1."""
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    q = [0.0] * m
    least = 1.0
    for rank in range(m, 0, -1):
        index = order[rank - 1]
        least = min(least, p_values[index] * m / rank)
        q[index] = least
    return q


def fisher(p_values):
    """P(chi^2 with 2k degrees of freedom >= -2 sum log p), as a Poisson sum."""
    half = -sum(math.log(p) for p in p_values)
    terms = (half**i / math.factorial(i) for i in range(len(p_values)))
    return math.exp(-half) * sum(terms)


def places(weight):
    """Yield (flat index, irrep out or None, element or None) of every entry."""
    if not weight.paths:
        for index in range(weight.size):
            yield index, None, None
    for path in weight.paths:
        for offset in range(path.stop - path.start):
            place, rest = [], offset
            for n in reversed(path.shape):
                place.insert(0, rest % n)
                rest //= n
            axis = path.element_axis
            element = None if axis is None else weight.elements[place[axis]]
            yield path.start + offset, path.irrep_out, element
