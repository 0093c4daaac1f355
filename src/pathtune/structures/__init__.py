"""Labelled structures: reading, checking, splitting and their reference energies."""

from pathtune.structures.check import Finding, Report, check, require_cells
from pathtune.structures.read import (
    fingerprint,
    label_counts,
    read,
    write_predictions,
)
from pathtune.structures.reference_energies import (
    ReferenceEnergies,
    average,
    estimate,
    foundation,
    from_file,
    isolated,
    shift_energies,
    subtract,
)
from pathtune.structures.split import split_validation

__all__ = [
    "Finding",
    "ReferenceEnergies",
    "Report",
    "average",
    "check",
    "estimate",
    "fingerprint",
    "foundation",
    "from_file",
    "isolated",
    "label_counts",
    "read",
    "require_cells",
    "shift_energies",
    "split_validation",
    "subtract",
    "write_predictions",
]
