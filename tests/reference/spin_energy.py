"""Plain twin of the spin layer's equations: loops over pairs, in NumPy."""

from __future__ import annotations

import numpy as np

EYE = np.eye(3)


def moments(spins, pairs, units, cutoff, a, b, c):
    """m_i = a_i s_i + sum_j f [b_ij s_j + c_ij r (r . s_j)]."""
    result = a[:, None] * spins
    for p, (i, j) in enumerate(pairs):
        along = np.outer(units[p], units[p])
        result[i] += cutoff[p] * (b[p] * EYE + c[p] * along) @ spins[j]
    return result


def polar_vectors(n_atoms, pairs, units, cutoff, w):
    """v_i^k = sum_j f w_ij^k r; (n_atoms, k, 3)."""
    result = np.zeros((n_atoms, w.shape[1], 3))
    for p, (i, _) in enumerate(pairs):
        result[i] += cutoff[p] * np.outer(w[p], units[p])
    return result


def dzyaloshinskii_moriya(pairs, units, cutoff, d, v):
    """f sum_k d_ij^k (v_i^k + v_j^k) x r, for each pair."""
    return np.array(
        [
            cutoff[p] * np.cross(d[p] @ (v[i] + v[j]), units[p])
            for p, (i, j) in enumerate(pairs)
        ]
    )


def energy(m, pairs, units, cutoff, jay, kay, dee, alpha, site):
    """Energy of all pairs and atoms; `dee` contains the cutoff already."""
    total = 0.0
    anisotropy = np.zeros((len(m), 3, 3))
    for p, (i, j) in enumerate(pairs):
        dot = m[i] @ m[j]
        total += 0.5 * cutoff[p] * (jay[p] * dot + kay[p] * dot**2)
        total += 0.5 * dee[p] @ np.cross(m[i], m[j])
        traceless = np.outer(units[p], units[p]) - EYE / 3
        anisotropy[i] += cutoff[p] * alpha[p] * traceless
    for i in range(len(m)):
        total += m[i] @ anisotropy[i] @ m[i]
        x = m[i] @ m[i] / 4.0
        total += site[i] @ [x, x**2, x**3]
    return total


def ridge(table, strength):
    """Least squares for the last column; the others are brought to length one."""
    columns, target = table[:, :-1], table[:, -1]
    lengths = np.linalg.norm(columns, axis=0)
    penalty = np.sqrt(strength) * np.eye(len(lengths))
    rows = np.concatenate([columns / lengths, penalty])
    targets = np.concatenate([target, np.zeros(len(lengths))])
    return np.linalg.lstsq(rows, targets, rcond=None)[0] / lengths
