"""Plain twins of the methods without factors: dW from a method's own numbers."""

from __future__ import annotations

from tests.reference import str_step


def free(delta, **_):
    """full, dense, scratch: dW is the parameter."""
    return list(delta)


def on_support(delta, support, **_):
    """random_support, and the others once their support is fixed."""
    return [d if s else 0.0 for d, s in zip(delta, support, strict=True)]


def thresholded(delta, tau, sizes, **_):
    """sparse and sparse_naive: an own threshold for each target."""
    result, start = [], 0
    for t, size in zip(tau, sizes, strict=True):
        part = delta[start : start + size]
        result += str_step.soft_threshold(part, str_step.sigmoid(t))
        start += size
    return result


def nothing(sizes, **_):
    """frozen."""
    return [0.0] * sum(sizes)
