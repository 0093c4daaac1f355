"""Labelled structures: reading, checking, splitting and their reference energies."""

from pathtune.structures.check import (
    Finding,
    Report,
    check,
    require_cells,
    sample,
    spread,
)
from pathtune.structures.magnetic import Scale, fit_scale, magnetised, unmagnetised
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
)
from pathtune.structures.split import split_validation
from pathtune.structures.store import take
from pathtune.structures.survey import Survey, is_lone_atom, survey

__all__ = [
    "Finding",
    "ReferenceEnergies",
    "Report",
    "Scale",
    "Survey",
    "average",
    "check",
    "estimate",
    "fingerprint",
    "fit_scale",
    "foundation",
    "from_file",
    "is_lone_atom",
    "isolated",
    "label_counts",
    "magnetised",
    "read",
    "require_cells",
    "sample",
    "split_validation",
    "spread",
    "survey",
    "take",
    "unmagnetised",
    "write_predictions",
]
