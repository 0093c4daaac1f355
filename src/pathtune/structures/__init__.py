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
    is_lone_atom,
    isolated,
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
    "is_lone_atom",
    "isolated",
    "label_counts",
    "read",
    "require_cells",
    "split_validation",
    "write_predictions",
]
