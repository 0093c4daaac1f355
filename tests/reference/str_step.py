"""Plain twins of the sparse method, written from the paper's equations.

arXiv 2606.18691: S(dW, δ) = sign(dW) ReLU(|dW| - δ), δ = sigmoid(τ); its gradients;
one schedule-free AdamW step (Defazio et al. 2024, algorithm 1) with decoupled decays.
"""

from __future__ import annotations

import math


def sigmoid(tau):
    return 1 / (1 + math.exp(-tau))


def soft_threshold(delta, threshold):
    """Entry by entry, on a list of floats."""
    result = []
    for value in delta:
        if value > threshold:
            result.append(value - threshold)
        elif value < -threshold:
            result.append(value + threshold)
        else:
            result.append(0.0)
    return result


def gradients(delta, tau, upstream):
    """Return dL/d(dW) and dL/dτ for dL/dŴ = upstream."""
    threshold = sigmoid(tau)
    by_delta, by_threshold = [], 0.0
    for value, g in zip(delta, upstream, strict=True):
        alive = abs(value) > threshold
        by_delta.append(g if alive else 0.0)
        if alive:
            by_threshold -= math.copysign(1.0, value) * g
    return by_delta, threshold * (1 - threshold) * by_threshold


class ScheduleFree:
    """Schedule-free AdamW of one scalar, following the theory: y, z and x apart."""

    def __init__(self, value, lr, decay, warmup, beta1=0.9, beta2=0.999, eps=1e-8):
        self.z = self.x = value
        self.v, self.t, self.weights, self.lr_max = 0.0, 0, 0.0, 0.0
        self.lr, self.decay, self.warmup = lr, decay, warmup
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    @property
    def y(self):
        return (1 - self.beta1) * self.z + self.beta1 * self.x

    def step(self, gradient):
        self.t += 1
        lr = self.lr * min(1.0, self.t / self.warmup) if self.warmup else self.lr
        self.lr_max = max(self.lr_max, lr)
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        corrected = self.v / (1 - self.beta2**self.t)
        direction = gradient / (math.sqrt(corrected) + self.eps) + self.decay * self.y
        weight = self.lr_max**2
        self.weights += weight
        c = weight / self.weights
        self.z -= lr * direction
        self.x = (1 - c) * self.x + c * self.z
