"""Slow twin of the least squares for reference energies: spelt-out normal equations."""

import numpy as np


def least_squares(compositions, targets):
    """Return the minimum-norm minimiser of ``||targets - compositions @ x||``.

    The normal matrix is built entry by entry, and inverted on the space where its
    eigenvalues are not zero.
    """
    n_structures, n_elements = len(compositions), len(compositions[0])
    normal = np.zeros((n_elements, n_elements))
    right = np.zeros(n_elements)
    for s in range(n_structures):
        for a in range(n_elements):
            right[a] += compositions[s][a] * targets[s]
            for b in range(n_elements):
                normal[a, b] += compositions[s][a] * compositions[s][b]
    values, vectors = np.linalg.eigh(normal)
    solution = np.zeros(n_elements)
    for value, vector in zip(values, vectors.T, strict=True):
        if value > 1e-10 * values.max():
            solution += vector * (vector @ right) / value
    return solution
