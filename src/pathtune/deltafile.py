"""The delta file: what a fine-tuning changed, its format and its algebra.

One safetensors file without pickle: ``<parameter>.indices`` (int32 into the flat
tensor) and ``<parameter>.values`` (float64), or ``<parameter>.dense`` where most
entries changed, and ``<parameter>.remainder`` where float64 alone rounds; a layer that
the base does not have as it is, its names beginning with ``spin.``; everything else is
sorted JSON under the metadata key ``pathtune``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from pathtune import files
from pathtune.errors import PathtuneError, UsageError

FORMAT_VERSION = 1
_KEY = "pathtune"
# What the names of a spin layer's parameters begin with, in no base.
_LAYER = "spin."
# Above this share of changed entries the dense form is the smaller one.
_DENSE_ABOVE = 2 / 3


@dataclass(frozen=True, eq=False)
class Change:
    """The changed entries of one parameter.

    Parameters
    ----------
    indices
        Flat indices, int64, ascending, shape (n_changed,).
    values
        dW at these, float64, shape (n_changed,).
    shape
        Shape of the parameter.
    remainder
        What is rounded off `values`, float64, shape (n_changed,), or None for nothing.
        With it W + dW and W' - dW are exact also for weights in float64, and where W
        is many orders of magnitude smaller than dW.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    remainder: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of entries of the parameter."""
        return int(np.prod(self.shape, dtype=np.int64))

    def dense(self) -> Tensor:
        """Return dW with zeros filled in; float64, shape (size,)."""
        return torch.zeros(self.size, dtype=torch.float64).index_put(
            (self.indices,), self.values
        )


def exact_change(base: Tensor, merged: Tensor) -> Change:
    """Return the exact difference of two stored tensors where their values differ."""
    indices = torch.nonzero(base.flatten() != merged.flatten()).flatten()
    old, new = base.flatten()[indices].double(), merged.flatten()[indices].double()
    values, remainder = _two_sum(new, -old)
    return Change(
        indices, values, tuple(base.shape), remainder if remainder.any() else None
    )


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a + b as it is rounded, and what was rounded off.

    References
    ----------
    Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def _from_dense(values: Tensor, shape: tuple[int, ...]) -> Change:
    indices = torch.nonzero(values).flatten()
    return Change(indices, values[indices], shape)


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of every tensor in its stored dtype (shape included)."""
    digests = {}
    for name, tensor in weights.items():
        header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        raw = tensor.detach().cpu().contiguous().numpy().tobytes()
        digests[name] = hashlib.sha256(header + raw).hexdigest()
    return digests


@dataclass(frozen=True, eq=False)
class DeltaFile:
    """What a delta file holds.

    Parameters
    ----------
    changes
        Parameter name -> changed entries.
    shifts
        Element -> shift of the reference energy (eV) relative to the base.
    metadata
        JSON: ``backend``, ``model``, ``head``, ``method``, ``base`` (SHA-256 of every
        tensor), ``tensors`` (the path record of each touched parameter), ``elements``,
        ``data``, ``metrics``, ``level_of_theory``, ``versions``, ``licence``,
        ``reference_energies``, ``sparsity``; with a layer ``spin``, its settings.
    layer
        Parameters of a spin layer by name, in the precision of the run; dense, and
        none of the base's.
    """

    changes: Mapping[str, Change]
    shifts: Mapping[str, float]
    metadata: Mapping[str, Any]
    layer: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def new_parameters(self) -> int:
        """Number of parameters the base does not have."""
        return sum(tensor.numel() for tensor in self.layer.values())

    @property
    def updated_parameters(self) -> int:
        """Number of entries that differ from the base, and of new parameters."""
        changed = sum(len(c.indices) for c in self.changes.values())
        return changed + self.new_parameters

    # File format

    def save(self, path: Path) -> None:
        """Write the file; equal contents give equal bytes."""
        tensors = dict(self.layer)
        for name, change in self.changes.items():
            if len(change.indices) > _DENSE_ABOVE * change.size:
                tensors[f"{name}.dense"] = change.dense()
            else:
                tensors[f"{name}.indices"] = change.indices.to(torch.int32)
                tensors[f"{name}.values"] = change.values
            if (remainder := change.remainder) is not None:
                short = remainder.float()
                is_exact = torch.equal(short.double(), remainder)
                tensors[f"{name}.remainder"] = short if is_exact else remainder
        content = dict(self.metadata) | {
            "format_version": FORMAT_VERSION,
            "shapes": {n: list(c.shape) for n, c in self.changes.items()},
            "shifts": dict(self.shifts),
        }
        header = {_KEY: json.dumps(content, sort_keys=True)}
        files.write_bytes(path, to_bytes(tensors, metadata=header))

    @classmethod
    def load(cls, path: Path) -> DeltaFile:
        """Read and check a file.

        Raises
        ------
        PathtuneError
            If the file is missing, truncated, no delta, of a newer format, or its
            indices do not fit its shapes.
        """
        path = Path(path)
        if not path.is_file():
            raise PathtuneError(f"{path}: no such delta file")
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                header = opened.metadata() or {}
                tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
            content = dict(json.loads(header[_KEY]))
        except (safetensors.SafetensorError, OSError) as error:
            raise PathtuneError(
                f"{path} is truncated or no delta file ({error})"
            ) from error
        except (KeyError, ValueError, TypeError) as error:
            raise PathtuneError(
                f"{path} is a safetensors file without a pathtune header; give the "
                "delta.safetensors of a run"
            ) from error
        if (version := content.pop("format_version", None)) != FORMAT_VERSION:
            raise PathtuneError(
                f"{path} has format version {version}, this pathtune reads "
                f"{FORMAT_VERSION}; update pathtune"
            )
        try:
            shapes = {n: tuple(s) for n, s in content.pop("shapes").items()}
            shifts = {e: float(v) for e, v in content.pop("shifts").items()}
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise PathtuneError(
                f"{path}: the shapes or shifts in its header cannot be read; the file "
                "is damaged"
            ) from error
        changes = {
            name: _read_change(path, name, shape, tensors)
            for name, shape in shapes.items()
        }
        layer = {
            name: tensors.pop(name)
            for name in sorted(tensors)
            if name.startswith(_LAYER) and content.get("spin")
        }
        if tensors:
            raise PathtuneError(f"{path} has stray tensors: {', '.join(tensors)}")
        for name, tensor in layer.items():
            if not torch.isfinite(tensor).all():
                raise PathtuneError(f"{path}: {name} has infinite or NaN values")
        return cls(changes, shifts, content, layer)

    # Use

    def require_base(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse any other base than the one the delta was made for.

        Raises
        ------
        PathtuneError
            Naming the first tensor that differs.
        """
        ours = self.metadata.get("base", {})
        theirs = fingerprint(weights)
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                raise PathtuneError(
                    f"this delta was made for {self.metadata.get('model')!r}; the "
                    f"given model differs from it, first in {name!r}"
                )

    def apply(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return W + dW of touched parameters, in the stored dtype, and the layer."""
        self.require_base(weights)
        return self.merged(weights)

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `apply` does, of a base already checked."""
        return self._moved(weights, 1) | dict(self.layer)

    def remove(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all parameters of the base, bit for bit, from the tuned ones.

        Exact for a delta as a run writes it. One that was scaled or added rounds when
        it is applied, and where that loses bits of the base this is an error.

        Raises
        ------
        PathtuneError
            If the result is not the base the delta was made for.
        """
        restored = {**weights, **self._moved(weights, -1)}
        restored = {n: t for n, t in restored.items() if n not in self.layer}
        self.require_base(restored)
        return restored

    def _moved(self, weights: Mapping[str, Tensor], sign: int) -> dict[str, Tensor]:
        moved = {}
        for name, change in self.changes.items():
            flat = weights[name].flatten().clone()
            old = flat[change.indices].double()
            new, rounded = _two_sum(old, sign * change.values)
            if change.remainder is not None:
                new = new + (rounded + sign * change.remainder)
            if not torch.isfinite(new).all():
                raise PathtuneError(f"the delta makes {name} infinite or NaN")
            flat[change.indices] = new.to(flat.dtype)
            moved[name] = flat.view(weights[name].shape)
        return moved

    # Algebra

    def scale(self, factor: float) -> DeltaFile:
        """Return factor * delta, reference-energy shifts included.

        Raises
        ------
        UsageError
            If it has a spin layer: what that adds is not linear in its parameters.
        """
        if self.layer:
            raise UsageError(
                "a delta with a spin layer cannot be scaled: half of the layer's "
                "parameters are not half of its energy"
            )
        changes = {
            name: _from_dense(factor * c.dense(), c.shape)
            for name, c in self.changes.items()
        }
        shifts = {s: factor * v for s, v in self.shifts.items()}
        return self._derived(changes, shifts, f"{factor:g} * ({self._label})", [self])

    def add(self, other: DeltaFile, *, sign: int = 1) -> DeltaFile:
        """Return self + sign * other; a spin layer of `self` stays as it is.

        Raises
        ------
        UsageError
            If `other` has a spin layer.
        PathtuneError
            If the two were made for different bases or heads.
        """
        mine, theirs = self.metadata.get("base", {}), other.metadata.get("base", {})
        for name in [*mine, *theirs]:
            if mine.get(name) != theirs.get(name):
                raise PathtuneError(
                    "the two deltas were made for different bases "
                    f"({self.metadata.get('model')!r}, {other.metadata.get('model')!r})"
                    f", first in {name!r}"
                )
        if self.metadata.get("head") != other.metadata.get("head"):
            raise PathtuneError(
                f"the two deltas are for different heads: {self.metadata.get('head')} "
                f"and {other.metadata.get('head')}"
            )
        if other.layer:
            raise UsageError(
                "spin layers cannot be added or subtracted: what they do is not linear "
                "in their parameters. Only the first of two deltas may have one"
            )
        changes = {}
        for name in sorted({*self.changes, *other.changes}):
            parts = [
                (s, d.changes[name])
                for s, d in ((1, self), (sign, other))
                if name in d.changes
            ]
            total = torch.stack([s * c.dense() for s, c in parts]).sum(0)
            changes[name] = _from_dense(total, parts[0][1].shape)
        shifts = {
            s: self.shifts.get(s, 0.0) + sign * other.shifts.get(s, 0.0)
            for s in sorted({*self.shifts, *other.shifts})
        }
        symbol = "+" if sign > 0 else "-"
        label = f"({self._label}) {symbol} ({other._label})"
        return self._derived(changes, shifts, label, [self, other])

    @property
    def _label(self) -> str:
        return str(self.metadata.get("label") or self.metadata.get("method", {}))

    def _derived(
        self,
        changes: Mapping[str, Change],
        shifts: Mapping[str, float],
        label: str,
        parents: list[DeltaFile],
    ) -> DeltaFile:
        """Keep what describes the base; what described a run no longer holds."""
        changes = {n: c for n, c in changes.items() if len(c.indices)}
        kept = (
            *("backend", "model", "head", "base", "versions", "licence"),
            *("spin", "magforces_scale"),
        )
        metadata = {k: self.metadata[k] for k in kept if k in self.metadata}
        tensors: dict[str, Any] = {}
        for parent in parents:
            tensors |= parent.metadata.get("tensors", {})
        metadata["tensors"] = {n: tensors[n] for n in changes if n in tensors}
        metadata["elements"] = sorted(
            {e for p in parents for e in p.metadata.get("elements", [])}
        )
        metadata["label"] = label
        return dataclasses.replace(
            self, changes=changes, shifts=shifts, metadata=metadata
        )


def _read_change(
    path: Path, name: str, shape: tuple[int, ...], tensors: dict[str, Tensor]
) -> Change:
    size = int(np.prod(shape, dtype=np.int64))
    dense = tensors.pop(f"{name}.dense", None)
    remainder = tensors.pop(f"{name}.remainder", None)
    if dense is not None:
        if dense.shape != (size,) or not torch.isfinite(dense).all():
            raise PathtuneError(f"{path}: {name}.dense does not fit shape {shape}")
        change = _from_dense(dense.double(), shape)
        return _with_remainder(path, name, change, remainder)
    indices = tensors.pop(f"{name}.indices", None)
    values = tensors.pop(f"{name}.values", None)
    if indices is None or values is None or indices.shape != values.shape:
        raise PathtuneError(f"{path}: {name} lacks indices or values")
    indices = indices.long()
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise PathtuneError(
            f"{path}: an index of {name} lies outside its {size} entries; the file is "
            "damaged"
        )
    if (indices.diff() <= 0).any():
        raise PathtuneError(f"{path}: the indices of {name} are not ascending")
    if not torch.isfinite(values).all():
        raise PathtuneError(f"{path}: {name} has infinite or NaN values")
    change = Change(indices, values.double(), shape)
    return _with_remainder(path, name, change, remainder)


def _with_remainder(
    path: Path, name: str, change: Change, remainder: Tensor | None
) -> Change:
    if remainder is None:
        return change
    if remainder.shape != change.values.shape or not torch.isfinite(remainder).all():
        raise PathtuneError(f"{path}: {name}.remainder does not fit its values")
    return dataclasses.replace(change, remainder=remainder.double())


def compare(a: DeltaFile, b: DeltaFile) -> dict[str, Any]:
    """Compare two deltas: overlap of their supports and distance of their values.

    Returns
    -------
    dict
        ``jaccard`` of the supports, ``only_a``, ``only_b``, ``both`` (entries),
        ``relative_distance`` = |dW_a - dW_b| / max(|dW_a|, |dW_b|), and the same for
        each parameter under ``tensors``.
    """
    rows = {}
    total = np.zeros(6)
    for name in sorted({*a.changes, *b.changes}):
        shape = (a.changes.get(name) or b.changes[name]).shape
        zero = Change(torch.empty(0, dtype=torch.int64), torch.empty(0).double(), shape)
        x, y = a.changes.get(name, zero).dense(), b.changes.get(name, zero).dense()
        if x.shape != y.shape:
            raise PathtuneError(f"the two deltas differ in the shape of {name}")
        both = int(((x != 0) & (y != 0)).sum())
        counts = np.array(
            [
                int((x != 0).sum()) - both,
                int((y != 0).sum()) - both,
                both,
                float(((x - y) ** 2).sum()),
                float((x**2).sum()),
                float((y**2).sum()),
            ]
        )
        rows[name] = _overlap(counts)
        total += counts
    return _overlap(total) | {"tensors": rows}


def _overlap(counts: np.ndarray) -> dict[str, Any]:
    only_a, only_b, both, distance, norm_a, norm_b = counts
    union = only_a + only_b + both
    scale = max(norm_a, norm_b)
    return {
        "only_a": int(only_a),
        "only_b": int(only_b),
        "both": int(both),
        "jaccard": float(both / union) if union else 1.0,
        "relative_distance": float((distance / scale) ** 0.5) if scale else 0.0,
    }
