"""e3nn's layers, rewritten for training: same weights, same numbers, less traffic.

A loss on forces is differentiated twice. e3nn's layers cut their input into irreps by
slicing, and the derivative of every slice fills a tensor of the input's full size with
zeros; its tensor product writes one message for each edge before they are summed. The
layers here split once, keep the channels in the last dimension, and sum the messages of
an atom inside a matrix product, so that no tensor of the size edges x message exists.
They are drop-in replacements with the parameters of the originals.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Join(torch.autograd.Function):
    """Concatenate columns; the backward pass splits instead of slicing.

    The derivative of a slice is a tensor of zeros with one part filled in; that of a
    split is one concatenation.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        return gradient.split(ctx.sizes, dim=1)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the columns of output irreps."""
    joined: Tensor = _Join.apply(*parts) if len(parts) > 1 else parts[0]
    return joined


def _by_irrep(
    values: Sequence[tuple[int, Tensor]], irreps: Sequence[tuple[int, int]]
) -> Tensor:
    """Sum the values (n, dim, mul) of each output irrep; (n, irreps_out.dim).

    Outputs that no path reaches are zero.
    """
    summed: dict[int, Tensor] = {}
    for index, value in values:
        summed[index] = summed[index] + value if index in summed else value
    like = values[0][1]
    return _join(
        [
            _flat(summed[index])
            if index in summed
            else like.new_zeros(len(like), mul * dim)
            for index, (mul, dim) in enumerate(irreps)
        ]
    )


class _Place(torch.autograd.Function):
    """Copy rows to places, zeros elsewhere; a gather both ways.

    `places[i]` is the row of the result that row i goes to, `rows[j]` the row that
    place j takes, and len(places) for none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        return _gather(x, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, places = ctx.saved_tensors
        return _Take.apply(gradients[0], rows, places), None, None


class _Take(torch.autograd.Function):
    """The transpose of `_Place`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, places = ctx.saved_tensors
        return _Place.apply(gradients[0], rows, places), None, None


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows], and zeros where a row is len(x)."""
    taken = x.index_select(0, rows.clamp(max=len(x) - 1))
    return taken.masked_fill_((rows == len(x)).view(-1, *[1] * (x.dim() - 1)), 0)


def _channels_last(x: Tensor, mul: int, dim: int) -> Tensor:
    """(n, mul * dim) -> (n, dim, mul)."""
    return x.view(-1, mul, dim).transpose(1, 2) if dim > 1 else x.unsqueeze(1)


def _flat(x: Tensor) -> Tensor:
    """(n, dim, mul) -> (n, mul * dim), e3nn's order."""
    return x.transpose(1, 2).flatten(1)


class Linear(nn.Module):
    """An ``o3.Linear`` without biases: one matrix product for each path."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight = original.weight
        self._in = [(mul, ir.dim) for mul, ir in original.irreps_in]
        self._out = [(mul, ir.dim) for mul, ir in original.irreps_out]
        self._paths = [
            (i.i_in, i.i_out, tuple(i.path_shape), i.path_weight)
            for i in original.instructions
        ]

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether a layer can be replaced."""
        return bool(layer.internal_weights) and not layer.bias_numel

    def forward(self, features: Tensor) -> Tensor:
        """(..., irreps_in.dim) -> (..., irreps_out.dim)."""
        x = features.reshape(-1, features.shape[-1])
        parts = x.split([mul * dim for mul, dim in self._in], dim=1)
        weights = self.weight.split(
            [math.prod(shape) for _, _, shape, _ in self._paths]
        )
        values = []
        for (i, o, shape, norm), weight in zip(self._paths, weights, strict=True):
            mixing = norm * weight.view(shape)
            values.append((o, _channels_last(parts[i], *self._in[i]) @ mixing))
        joined = _by_irrep(values, self._out)
        return joined.view(*features.shape[:-1], joined.shape[1])


class SpeciesProduct(nn.Module):
    """A ``FullyConnectedTensorProduct`` with one-hot species as its second input.

    The weights (mul_1, n_elements, mul_out) of the elements that are present are
    applied as a linear layer; those of the others, most of them, are not touched.
    """

    def __init__(self, original: Any) -> None:
        from e3nn import o3

        super().__init__()
        self.weight = original.weight
        self._in = [(mul, ir.dim) for mul, ir in original.irreps_in1]
        self._out = [(mul, ir.dim) for mul, ir in original.irreps_out]
        self._paths = []
        for path in original.instructions:
            degree = original.irreps_in1[path.i_in1].ir.l
            coupling = o3.wigner_3j(degree, 0, degree, dtype=torch.float64)[0, 0, 0]
            norm = float(path.path_weight * coupling)
            shape = tuple(path.path_shape)
            self._paths.append((path.i_in1, path.i_out, shape, norm))

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether a layer can be replaced."""
        scalars = len(layer.irreps_in2) == 1 and layer.irreps_in2[0].ir.dim == 1
        modes = {i.connection_mode for i in layer.instructions}
        return scalars and bool(layer.internal_weights) and modes == {"uvw"}

    def forward(self, features: Tensor, species: Tensor) -> Tensor:
        """(n, irreps_in1.dim) and one-hot (n, n_elements) -> (n, irreps_out.dim)."""
        present, index = species.argmax(dim=1).unique(return_inverse=True)
        parts = features.split([mul * dim for mul, dim in self._in], dim=1)
        weights = self.weight.split(
            [math.prod(shape) for _, _, shape, _ in self._paths]
        )
        rows = torch.arange(len(features), device=features.device)
        values = []
        for (i, o, shape, norm), weight in zip(self._paths, weights, strict=True):
            mul, dim = self._in[i]
            own = weight.view(shape).index_select(1, present).flatten(1) * norm
            value = _channels_last(parts[i], mul, dim) @ own
            value = value.view(len(rows), dim, len(present), -1)[rows, :, index]
            values.append((o, value))
        return _by_irrep(values, self._out)


class Convolution(nn.Module):
    """Gather, tensor product with weights for each edge, sum over neighbours.

    With features x of the source, spherical harmonics Y and weights w of an edge,
    path by path: out[c, k, u] = sum over edges e to c and over i of
    M[e, i, k] w[e, u] x[e, i, u], where M[e, i, k] = sum over j of C[i, j, k] Y[e, j].
    The edges of an atom lie in rows of equal width, so the sum is a matrix product.
    """

    couplings: Tensor

    def __init__(self, original: Any, dtype: torch.dtype) -> None:
        from e3nn import o3

        super().__init__()
        self._in = [(mul, ir.dim) for mul, ir in original.irreps_in1]
        self._out = [(mul, ir.dim) for mul, ir in original.irreps_out]
        self._paths = []
        columns = []
        slices = original.irreps_in2.slices()
        for path in original.instructions:
            irreps = (
                original.irreps_in1[path.i_in1].ir,
                original.irreps_in2[path.i_in2].ir,
                original.irreps_out[path.i_out].ir,
            )
            coupling = o3.wigner_3j(*(ir.l for ir in irreps), dtype=torch.float64)
            whole = coupling.new_zeros(
                irreps[0].dim, original.irreps_in2.dim, irreps[2].dim
            )
            whole[:, slices[path.i_in2]] = coupling * path.path_weight
            columns.append(whole.transpose(0, 1).flatten(1))
            self._paths.append((path.i_in1, path.i_out, irreps[2].dim))
        self._widths = [math.prod(p.path_shape) for p in original.instructions]
        # Not a parameter, not in the state dict: the original's are what counts.
        couplings = torch.cat(columns, dim=1).to(dtype)
        self.register_buffer("couplings", couplings, persistent=False)

    @staticmethod
    def replaces(layer: Any) -> bool:
        """Whether a tensor product can be replaced."""
        modes = {(i.connection_mode, i.has_weight) for i in layer.instructions}
        single = all(mul == 1 for mul, _ in layer.irreps_in2)
        return single and modes == {("uvu", True)} and not layer.internal_weights

    def forward(
        self, x: Tensor, y: Tensor, weight: Tensor, source: Tensor, center: Tensor
    ) -> Tensor:
        """Return the summed messages.

        Parameters
        ----------
        x
            (n_atoms, irreps_in1.dim) features.
        y
            (n_edges, irreps_in2.dim) spherical harmonics.
        weight
            (n_edges, n_weights).
        source, center
            (n_edges,) where a message comes from and goes to.

        Returns
        -------
        Tensor
            (n_atoms, irreps_out.dim)
        """
        n = len(x)
        source, center = source.long(), center.long()
        if not len(center):  # isolated atoms; stay in the graph, so forces exist
            size = sum(mul * dim for mul, dim in self._out)
            return x.new_zeros(n, size) + 0 * (x.sum() + y.sum() + weight.sum())
        rows, places, owners = edge_rows(center, n)
        matrices = y @ self.couplings
        if rows is not None:
            matrices, weight = (
                _Place.apply(t, rows, places) for t in (matrices, weight)
            )
            source = source.index_select(0, rows.clamp(max=len(source) - 1))
        n_rows = n if owners is None else len(owners)
        parts = x.split([mul * dim for mul, dim in self._in], dim=1)
        gathered = [
            _channels_last(part, mul, dim).contiguous().index_select(0, source)
            for part, (mul, dim) in zip(parts, self._in, strict=True)
        ]
        values = []
        for (i, o, k), m, w in zip(
            self._paths,
            matrices.split([self._in[i][1] * k for i, _, k in self._paths], dim=1),
            weight.split(self._widths, dim=1),
            strict=True,
        ):
            weighted = (gathered[i] * w.unsqueeze(1)).view(n_rows, -1, self._in[i][0])
            mixing = m.reshape(n_rows, -1, k).transpose(1, 2)
            values.append((o, torch.bmm(mixing, weighted)))
        summed = _by_irrep(values, self._out)
        if owners is None:
            return summed
        return summed.new_zeros(n, summed.shape[1]).index_add(0, owners, summed)


def edge_rows(center: Tensor, n: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Lay the edges of each atom out in rows of one width, padded.

    The width is chosen such that padding and the adding of rows cost least.

    Parameters
    ----------
    center
        (n_edges,) the atom each edge belongs to.
    n
        Number of atoms.

    Returns
    -------
    tuple
        Edge of each place, n_edges for padding, or None where edges lie in order and
        without padding; place of each edge; atom of each row, or None where atoms
        and rows are the same.
    """
    degree = torch.bincount(center, minlength=n)
    widths = torch.arange(1, max(2, int(degree.max()) + 1), device=center.device)
    per_atom = (degree.unsqueeze(1) + widths - 1) // widths
    # A row costs its places and, measured in places, about three for adding it up.
    width = int(widths[(per_atom.sum(0) * (widths + 3)).argmin()])
    n_rows = per_atom[:, width - 1].clamp(min=1)
    first = (n_rows.cumsum(0) - n_rows) * width
    order = torch.argsort(center, stable=True)
    ordered = center[order]
    rank = torch.arange(len(center), device=center.device)
    rank = rank - (degree.cumsum(0) - degree)[ordered]
    places = torch.empty_like(center)
    places[order] = first[ordered] + rank
    total = int(n_rows.sum()) * width
    rows = torch.full((total,), len(center), device=center.device)
    rows[places] = torch.arange(len(center), device=center.device)
    owners = None
    if total != n * width:
        owners = torch.arange(n, device=center.device).repeat_interleave(n_rows)
    in_order = total == len(center) and bool((rows[1:] > rows[:-1]).all())
    return (None if in_order else rows), places, owners


def drop_in(module: nn.Module) -> nn.Module | None:
    """Return the replacement of one of e3nn's own layers, or None."""
    from e3nn import o3

    if isinstance(module, o3.Linear) and Linear.replaces(module):
        return Linear(module)
    is_product = isinstance(module, o3.FullyConnectedTensorProduct)
    if is_product and SpeciesProduct.replaces(module):
        return SpeciesProduct(module)
    return None


def rewritten(
    model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    """Return a copy of a model with layers replaced.

    Parameters
    ----------
    model
        Not modified.
    replacement
        Module -> what replaces it, with the same parameters by the same names; None
        leaves it and goes on inside.
    """
    model = copy.deepcopy(model)

    def descend(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            new = replacement(child)
            if new is None:
                descend(child)
            else:
                module._modules[name] = new

    descend(model)
    return model
