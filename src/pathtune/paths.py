"""Path weights: what each parameter of a model is, and which entries are selected.

An equivariant layer is a sum over symmetry-allowed paths (irrep in -> irrep out),
each a fixed Clebsch-Gordan coupling times free scalar weights. Changing only those
scalars cannot break E(3) equivariance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pathtune.errors import UsageError, unknown
from pathtune.properties import PROPERTIES, Property

Kind = Literal["linear", "fctp", "contraction", "radial", "scale_shift", "other"]
Role = Literal["embedding", "interaction", "readout"]
KINDS = ("linear", "fctp", "contraction", "radial", "scale_shift", "other")
ROLES = ("embedding", "interaction", "readout")

# What the paper calls "All": layers with internal weights on irreps.
PATH_KINDS = frozenset({"linear", "fctp"})
FIELDS = ("kind", "role", "layer", "l", "name")
GROUPS = ("all", "everything", *KINDS, *ROLES)


@dataclass(frozen=True)
class Path:
    """One path: a contiguous slice of a flat weight.

    Parameters
    ----------
    start, stop
        The slice of the flattened weight tensor.
    shape
        Its shape, e.g. (mul_in, mul_out) or (mul_1, n_elements, mul_out).
    irrep_in, irrep_out
        Irreps in e3nn's notation, e.g. ``"1o"``.
    element_axis
        Axis of `shape` that runs over the element table, or None.
    head_axis
        Axis of `shape` that runs over the heads (modalities), or None; several where
        channels of each head are mixed with channels of the same head only.
    block_in, block_out
        Which block of the layer's input and output irreps it connects; paths with an
        equal `block_in` read the same channels. None where that is not known.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    irrep_in: str
    irrep_out: str
    element_axis: int | None = None
    head_axis: int | tuple[int, ...] | None = None
    block_in: int | None = None
    block_out: int | None = None

    @property
    def l(self) -> int:  # noqa: E743, the field's name
        """Degree of the output irrep."""
        return int(self.irrep_out[:-1])


@dataclass(frozen=True)
class PathWeight:
    """One parameter of a model: its operation, its place and its paths.

    Parameters
    ----------
    name
        Name in ``model.named_parameters()``.
    shape
        Its shape.
    kind
        The operation: linear, fctp (fully connected tensor product), contraction,
        radial, scale_shift or other.
    role
        embedding, interaction or readout.
    layer
        Index of the interaction layer; None outside the interactions.
    paths
        The slices of the flat weight; empty where the parameter has no irreps.
    elements
        Chemical symbols along `Path.element_axis`.
    heads
        Names along `Path.head_axis`.
    properties
        Predicted properties that depend on it; () where the model never uses it.
    unused
        Flat indices of single entries the model never uses.
    basis_axis
        Axis of `shape` that runs over the radial basis functions, or whatever else a
        radial network is fed with; None elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    role: Role
    layer: int | None = None
    paths: tuple[Path, ...] = ()
    elements: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    properties: tuple[Property, ...] = PROPERTIES
    unused: tuple[int, ...] = ()
    basis_axis: int | None = None

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def is_matrix(self) -> bool:
        """Whether it mixes channels: its paths, or itself, have two axes or more."""
        return all(len(s) > 1 for s in [p.shape for p in self.paths] or [self.shape])

    @property
    def is_flat(self) -> bool:
        """Whether several matrices lie one after another, as e3nn stores a layer."""
        return self.is_matrix and len(self.shape) == 1

    def alive(
        self,
        elements: Iterable[str],
        head: str | None,
        properties: Iterable[Property] = PROPERTIES,
    ) -> np.ndarray:
        """Return which entries can receive a gradient; bool, shape (size,).

        An entry that belongs to an element absent from the training data, to another
        head, or to a property that is not trained, cannot; nor can an unused one.
        """
        mask = np.full(self.size, not set(self.properties).isdisjoint(properties))
        mask[list(self.unused)] = False
        present = set(elements)
        for path in self.paths:
            block = mask[path.start : path.stop].reshape(path.shape)
            if path.element_axis is not None:
                absent = [s not in present for s in self.elements]
                np.moveaxis(block, path.element_axis, 0)[absent] = False
            if path.head_axis is not None:
                other = [h != head for h in self.heads]
                for axis in np.atleast_1d(path.head_axis):
                    np.moveaxis(block, int(axis), 0)[other] = False
        return mask

    def describe(self) -> dict[str, Any]:
        """Return the record as plain JSON types, without the name."""
        record = asdict(self)
        del record["name"], record["unused"]
        return record


def _matches(weight: PathWeight, term: str) -> np.ndarray:
    """Entries of `weight` that one term of a selection covers; bool, (size,)."""
    whole = np.full(weight.size, True)
    nothing = np.full(weight.size, False)
    field, equals, value = term.partition("=")
    # Reference energies are fitted, not trained: they must be named to be selected.
    named = term in ("scale_shift", "kind=scale_shift") or field == "name"
    if weight.kind == "scale_shift" and not named:
        return nothing
    if not equals:
        if term not in GROUPS:
            raise UsageError(
                unknown("selection", term, [*GROUPS, *(f"{f}=..." for f in FIELDS)])
            )
        hit = (
            (term == "all" and weight.kind in PATH_KINDS)
            or term == "everything"
            or term in (weight.kind, weight.role)
        )
        return whole if hit else nothing
    if field not in FIELDS:
        raise UsageError(unknown("selection", field, FIELDS))
    if field in ("kind", "role"):
        if value not in (known := KINDS if field == "kind" else ROLES):
            raise UsageError(unknown(field, value, known))
        return whole if getattr(weight, field) == value else nothing
    if field == "name":
        try:
            found = re.search(value, weight.name)
        except re.error as error:
            raise UsageError(f"{term!r} is no regular expression: {error}") from error
        return whole if found else nothing
    if not re.fullmatch(r"\d+(-\d+)?", value):
        raise UsageError(f"{term!r}: give a number or a range, e.g. {field}=0-2")
    low, _, high = value.partition("-")
    wanted = range(int(low), int(high or low) + 1)
    if field == "layer":
        return whole if weight.layer in wanted else nothing
    for path in weight.paths:
        nothing[path.start : path.stop] = path.l in wanted
    return nothing


def select(weights: Sequence[PathWeight], selection: str) -> Mapping[str, np.ndarray]:
    """Return the selected entries of each parameter.

    Parameters
    ----------
    weights
        Every parameter of a model.
    selection
        Terms joined by ``&`` (and) inside alternatives joined by ``,`` (or). A term
        is a group (``all`` = linear and fctp, ``everything``, a kind, a role) or
        ``kind=``, ``role=``, ``layer=0-2``, ``l=2``, ``name=<regular expression>``.

    Returns
    -------
    dict
        Parameter name -> bool array of shape (size,), parameters with at least one
        selected entry only.

    Raises
    ------
    UsageError
        If a term is malformed or matches nothing.
    """
    chosen = {w.name: np.zeros(w.size, dtype=bool) for w in weights}
    for alternative in selection.split(","):
        terms = [t.strip() for t in alternative.split("&")]
        for term in terms:
            if not any(_matches(w, term).any() for w in weights):
                raise UsageError(f"selection {term!r} matches no weight of this model")
        matched = False
        for weight in weights:
            mask = np.logical_and.reduce([_matches(weight, t) for t in terms])
            chosen[weight.name] |= mask
            matched |= bool(mask.any())
        if not matched:
            raise UsageError(
                f"selection {alternative.strip()!r} matches no weight of this model"
            )
    return {name: mask for name, mask in chosen.items() if mask.any()}


def alive_entries(
    weights: Sequence[PathWeight],
    selection: str,
    elements: Iterable[str],
    head: str | None,
    properties: Iterable[Property] = PROPERTIES,
) -> Mapping[str, np.ndarray]:
    """Return the flat indices of selected entries that can receive a gradient.

    Returns
    -------
    dict
        Parameter name -> int64 array of flat indices, ascending; parameters with
        none are left out.

    Raises
    ------
    UsageError
        If nothing is left to train.
    """
    elements, properties = tuple(elements), tuple(properties)
    by_name = {w.name: w for w in weights}
    indices = {
        name: np.flatnonzero(mask & by_name[name].alive(elements, head, properties))
        for name, mask in select(weights, selection).items()
    }
    indices = {name: i for name, i in indices.items() if i.size}
    if not indices:
        raise UsageError(
            f"selection {selection!r} leaves nothing to train: every entry belongs to "
            "elements, heads or properties that the training data do not reach"
        )
    return indices
