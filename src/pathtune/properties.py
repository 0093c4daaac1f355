"""The properties pathtune predicts and learns: keys, shapes, units and signs.

=========  ====================  =========  ===========================================
property   shape per structure   unit       meaning
=========  ====================  =========  ===========================================
energy     ()                    eV         total energy of the structure
forces     (n_atoms, 3)          eV/Å       -dE/dR
stress     (6,)                  eV/Å^3     (1/V) dE/dε, ASE sign (tension positive) and
                                            Voigt order xx, yy, zz, yz, xz, xy
magmoms    (n_atoms,) or         μ_B        atomic magnetic moments; scalars are
           (n_atoms, 3)                     collinear moments along z. NaN where an
                                            atom has no label
magforces  (n_atoms, 3)          eV/μ_B     magnetic forces -dE/dm at fixed positions;
                                            NaN where an atom has no label
=========  ====================  =========  ===========================================

A model that predicts one number for an atom predicts the magnitude of its moment
(CHGNet): labels are then compared by their magnitudes, see `moments_as_predicted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms
    from torch import Tensor

# Arrays of NumPy or PyTorch.
A = TypeVar("A", "np.ndarray[Any, Any]", "Tensor")

Property = Literal["energy", "forces", "stress", "magmoms", "magforces"]
PROPERTIES: tuple[Property, ...] = get_args(Property)
#: One row an atom.
BY_ATOM: tuple[Property, ...] = ("forces", "magmoms", "magforces")
#: Labels that single atoms of a structure may lack.
PARTIAL: tuple[Property, ...] = ("magmoms", "magforces")

# Where a label is looked for when the user names no key: the reference keys of
# the field first (MACE's defaults), then what ASE attaches as a calculator.
REFERENCE_KEYS: Mapping[Property, str] = {
    "energy": "REF_energy",
    "forces": "REF_forces",
    "stress": "REF_stress",
    "magmoms": "REF_magmoms",
    "magforces": "REF_magforces",
}
REFERENCE_VIRIALS_KEY = "REF_virials"

GPA = 0.006241509074  # eV/Å^3
KBAR = GPA / 10


@dataclass(frozen=True, eq=False)
class Structure:
    """One labelled configuration, in the units of this module.

    Parameters
    ----------
    atoms
        Positions (Å), cell (Å), species; without calculator. A full 3x3 virial or
        stress in the file has been converted.
    labels
        Only the labels that exist; shapes as in the table above, float64.
    weight
        Weight of the whole configuration in the loss (``config_weight``).
    property_weights
        Extra weight of single labels (``config_energy_weight`` and so on).
    config_type
        The file's ``config_type`` (or ``group``), for errors by configuration type.
    source
        File and index, e.g. ``"train.xyz:17"``, for messages.
    label_keys
        The key each label was found under.
    """

    atoms: Atoms
    labels: Mapping[Property, np.ndarray] = field(default_factory=dict)
    weight: float = 1.0
    property_weights: Mapping[Property, float] = field(default_factory=dict)
    config_type: str = "default"
    source: str = ""
    label_keys: Mapping[Property, str] = field(default_factory=dict)

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.atoms)

    def term_weight(self, name: Property) -> float:
        """Weight of label `name` in the loss: the configuration's times its own."""
        return self.weight * self.property_weights.get(name, 1.0)


def moment_vectors(magmoms: np.ndarray) -> np.ndarray:
    """Return moments as vectors, (n_atoms, 3) μ_B; scalars point along z."""
    if magmoms.ndim == 2:
        return magmoms
    return magmoms[:, None] * np.array([0.0, 0.0, 1.0])


def moments_as_predicted(vectors: A, predicted: A) -> A:
    """Return labels in the form in which a model predicts moments.

    Parameters
    ----------
    vectors
        Labels as vectors, (n_atoms, 3) μ_B.
    predicted
        (n_atoms, 3), or (n_atoms,) magnitudes.

    Returns
    -------
    array
        The vectors, or their magnitudes; the shape of `predicted`.
    """
    if predicted.ndim == 2:
        return vectors
    return (vectors**2).sum(-1) ** 0.5


Prediction = Mapping[Property, "np.ndarray[Any, Any]"]
