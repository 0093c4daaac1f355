"""The loss: a Huber term of each property; missing labels are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from pathtune.properties import (
    Property,
    Structure,
    moment_vectors,
    moments_as_predicted,
)


@dataclass(frozen=True)
class Labels:
    """Labels of one batch, in the model's precision; weight 0 marks a missing one.

    Parameters
    ----------
    energy
        (n_structures,) eV, reference-energy shifts subtracted.
    n_atoms
        (n_structures,).
    forces
        (n_atoms_total, 3) eV/Å.
    stress
        (n_structures, 6) eV/Å^3.
    magmoms
        (n_atoms_total, 3) μ_B.
    magforces
        (n_atoms_total, 3) eV/μ_B.
    energy_weight, stress_weight
        (n_structures,).
    forces_weight, magmoms_weight, magforces_weight
        (n_atoms_total,).
    """

    energy: Tensor
    n_atoms: Tensor
    forces: Tensor
    stress: Tensor
    magmoms: Tensor
    magforces: Tensor
    energy_weight: Tensor
    forces_weight: Tensor
    stress_weight: Tensor
    magmoms_weight: Tensor
    magforces_weight: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Labels:
        """Move all tensors."""
        moved = (getattr(self, f.name).to(device, dtype) for f in fields(self))
        return Labels(*moved)


def labels_of(structure: Structure, shifts: Mapping[str, float]) -> Labels:
    """Return the labels of one structure in float64.

    The shifts are subtracted here, before any rounding to float32.
    """
    n = structure.n_atoms

    def get(name: Property, shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
        if name in structure.labels:
            return np.asarray(structure.labels[name]), structure.term_weight(name)
        return np.zeros(shape), 0.0

    energy, energy_weight = get("energy", ())
    forces, forces_weight = get("forces", (n, 3))
    stress, stress_weight = get("stress", (6,))
    magmoms, magmoms_weight = get("magmoms", (n, 3))
    magmoms = moment_vectors(magmoms)
    has_moment = np.isfinite(magmoms).all(axis=1)
    magforces, magforces_weight = get("magforces", (n, 3))
    has_magforce = np.isfinite(magforces).all(axis=1)
    symbols = structure.atoms.get_chemical_symbols()
    energy = energy - sum(shifts.get(symbol, 0.0) for symbol in symbols)
    arrays = (
        energy.reshape(1),
        np.array([n]),
        forces,
        stress.reshape(1, 6),
        np.where(has_moment[:, None], magmoms, 0.0),
        np.where(has_magforce[:, None], magforces, 0.0),
        np.array([energy_weight]),
        np.full(n, forces_weight),
        np.array([stress_weight]),
        magmoms_weight * has_moment,
        magforces_weight * has_magforce,
    )
    return Labels(*(torch.from_numpy(np.asarray(a, dtype=float)) for a in arrays))


def collate(labels: Sequence[Labels]) -> Labels:
    """Concatenate the labels of several structures."""
    names = [f.name for f in fields(Labels)]
    return Labels(*(torch.cat([getattr(x, n) for x in labels]) for n in names))


def _term(difference: Tensor, weight: Tensor, delta: float, rows: int | None) -> Tensor:
    """Weighted Huber loss, averaged over the components of the labelled rows."""
    loss = huber_loss(
        difference, torch.zeros_like(difference), reduction="none", delta=delta
    )
    labelled = (weight > 0).sum() if rows is None else torch.tensor(rows)
    components = labelled.clamp(min=1) * loss.shape[1:].numel()
    weight = weight.view(-1, *[1] * (loss.dim() - 1)).expand_as(loss)
    return (weight * loss).sum() / components


def loss_terms(
    predicted: Mapping[Property, Tensor],
    labels: Labels,
    delta: float,
    rows: Mapping[Property, int] | None = None,
) -> dict[Property, Tensor]:
    """Return the unweighted loss of each predicted property.

    Parameters
    ----------
    predicted
        As `Backend.predict` returns it.
    labels
        Of the same structures.
    delta
        Width of the Huber loss, in eV/atom, eV/Å, eV/Å^3, μ_B and eV/μ_B.
    rows
        Labelled structures or atoms of the whole batch (`Survey.rows`), where these
        structures are a part of it: the terms of the parts then add up to the terms
        of the batch.
    """
    rows = rows or {}
    terms: dict[Property, Tensor] = {}
    if "energy" in predicted:
        per_atom = (predicted["energy"] - labels.energy) / labels.n_atoms
        terms["energy"] = _term(
            per_atom, labels.energy_weight, delta, rows.get("energy")
        )
    if "forces" in predicted:
        difference = predicted["forces"] - labels.forces
        terms["forces"] = _term(
            difference, labels.forces_weight, delta, rows.get("forces")
        )
    if "stress" in predicted:
        difference = predicted["stress"] - labels.stress
        # A cell-free structure has a meaningless predicted stress: keep it out of the
        # sum instead of multiplying it by zero, which would let a NaN through.
        difference = difference[labels.stress_weight > 0]
        weight = labels.stress_weight[labels.stress_weight > 0]
        terms["stress"] = _term(difference, weight, delta, rows.get("stress"))
    if "magmoms" in predicted:
        moments = moments_as_predicted(labels.magmoms, predicted["magmoms"])
        difference = predicted["magmoms"] - moments
        terms["magmoms"] = _term(
            difference, labels.magmoms_weight, delta, rows.get("magmoms")
        )
    if "magforces" in predicted:
        difference = predicted["magforces"] - labels.magforces
        terms["magforces"] = _term(
            difference, labels.magforces_weight, delta, rows.get("magforces")
        )
    return terms
