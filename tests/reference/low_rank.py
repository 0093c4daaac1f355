"""Plain twin of a low-rank change: products and their gradients, number by number."""

from __future__ import annotations


def product(a, b, scale):
    """Return s A B of nested lists."""
    n, rank, m = len(a), len(b), len(b[0])
    return [
        [scale * sum(a[i][k] * b[k][j] for k in range(rank)) for j in range(m)]
        for i in range(n)
    ]


def gradients(a, b, scale, upstream):
    """Return dL/dA and dL/dB for dL/d(s A B) = upstream."""
    n, rank, m = len(a), len(b), len(b[0])
    by_a = [
        [scale * sum(upstream[i][j] * b[k][j] for j in range(m)) for k in range(rank)]
        for i in range(n)
    ]
    by_b = [
        [scale * sum(a[i][k] * upstream[i][j] for i in range(n)) for j in range(m)]
        for k in range(rank)
    ]
    return by_a, by_b
