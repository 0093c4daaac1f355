"""What a fine-tuning changed: tables by path, statistics, ablation.

`explain` measures one change, `compare` sets several side by side; both return objects
whose ``document`` is what is written, as plain JSON types. A run's is in
``explain/explain.json`` with one CSV file a table beside it, and is written at the end
of every run: figures and reports read it there and need no model.

Keys of the document
--------------------
about
    ``backend``, ``model``, ``method``, ``seed``, ``select``, ``elements``,
    ``shifts`` (eV by element), ``new_parameters`` (of a spin layer, in no table), ...
totals
    One row of counts (see below) of the whole model.
tables
    Name -> rows: ``parameter``, ``layer``, ``kind``, ``role``, ``path`` (irrep in ->
    out), ``degree``, ``element``, ``radial`` (basis function), ``cell`` (layer x
    degree x element).
ranking
    The cells that hold most of the change, largest share first.
enrichment
    Rows of `pathtune.explain.enrichment.enrichment` by cell, over everything that
    could be changed.
orbitals
    The same by element and degree, over element-resolved weights alone, with
    ``channel`` s, p, d, f, ...
ablation
    None, or ``data``, ``n_structures`` and ``rows`` of
    `pathtune.explain.ablation.ablation`.
remarks
    Sentences a reader has to know, e.g. that channels are not orbitals.

A row of counts has ``entries``, ``alive`` (selected entries that could be trained),
``updated``, ``density`` = updated / alive, ``norm`` and ``relative_norm`` of dW,
``one_minus_r2``, ``largest`` |dW| and ``share`` of the squared norm. A ``layer`` is
the index of an interaction as text, or ``embedding`` or ``readout``. None in
``degree``: no irreps; in ``element``: shared by all elements.
"""

from pathtune.explain.account import (
    Explanation,
    explain,
    explain_checkpoints,
    explain_run,
)
from pathtune.explain.comparison import Comparison, compare

__all__ = [
    "Comparison",
    "Explanation",
    "compare",
    "explain",
    "explain_checkpoints",
    "explain_run",
]
