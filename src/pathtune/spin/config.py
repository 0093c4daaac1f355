"""The settings of the spin-aware layer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# Å. Exchange beyond it is rarely resolved by energies of cells of some hundred atoms.
LARGEST_R_MAX = 6.0


class SpinConfig(BaseModel):
    """The full identity of a spin layer, kept beside its parameters.

    Parameters
    ----------
    spins
        What the spins of a structure mean to the layer. ``moments``: vectors in μ_B,
        the energy depends on their lengths. ``directions``: only where they point; the
        layer predicts how long the moments are. ``none``: nothing is known of them; the
        layer predicts magnitudes and no energy.
    spin_orbit
        Couple spins to the lattice: Dzyaloshinskii-Moriya interaction, single-ion
        anisotropy, and moments that tilt with the lattice. Without it the energy does
        not change when all spins are rotated together and the atoms stay.
    biquadratic
        Whether pairs have a term K (m_i·m_j)^2.
    longitudinal
        Whether the lengths of moments matter: an energy of each atom that depends on
        it, and couplings of pairs that do.
    width
        Channels of the hidden layers.
    n_radial
        Radial functions of a distance.
    n_vectors
        Polar vectors of an atom, for the spin-orbit terms.
    r_max
        Cutoff of pairs (Å); that of the base model, at most 6 Å, by default.
    fit
        Whether couplings are fitted by least squares before the training, which starts
        from zero otherwise.
    lr, weight_decay
        Of the layer's parameters in training.
    form
        Which equations the parameters belong to; those of another form are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    spins: Literal["moments", "directions", "none"] = "moments"
    spin_orbit: bool = False
    biquadratic: bool = True
    longitudinal: bool = True
    width: int = Field(64, ge=1)
    n_radial: int = Field(8, ge=1)
    n_vectors: int = Field(4, ge=1)
    r_max: float | None = Field(None, gt=0)
    fit: bool = True
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    form: Literal[2] = 2
