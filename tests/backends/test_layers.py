"""The rewritten layers against e3nn's own, up to second derivatives, in float64."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from pathtune import layers
from pathtune.backends.base import undisturbed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("e3nn") is None, reason="needs e3nn"
)

IRREPS = "5x0e + 3x1o + 2x2e"


@pytest.fixture
def o3():
    """e3nn in double precision; 0.4.4 can only be imported after mace."""
    with undisturbed(torch.float64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("mace"):
            import mace  # noqa: F401
        from e3nn import o3

        torch.manual_seed(0)
        yield o3


def second_derivatives(layer, weights, *inputs):
    """Value, its derivatives, and the derivatives of those: as in a loss on forces."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    leaves = [*inputs, *weights]
    value = layer(*inputs)
    probe = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    first = torch.autograd.grad(
        (value**2 * probe).sum(), inputs, create_graph=True, materialize_grads=True
    )
    loss = sum((g**3).sum() for g in first) + (value**3).sum()
    if not loss.requires_grad:  # nothing depends on anything: no edges
        return value, *first
    return value, *first, *torch.autograd.grad(loss, leaves, materialize_grads=True)


def assert_same(old, new):
    assert len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().sum()) < 1e-11 * (1 + float(a.abs().sum()))


@pytest.mark.parametrize("irreps_out", [IRREPS, "4x0e + 2x1e + 3x1o", "2x0e + 1x0e"])
def test_linear(o3, irreps_out):
    old = o3.Linear(IRREPS, irreps_out)
    assert layers.Linear.replaces(old)
    new = layers.Linear(old)
    x = torch.randn(7, old.irreps_in.dim)
    assert_same(
        second_derivatives(old, [old.weight], x),
        second_derivatives(new, [new.weight], x),
    )
    assert dict(new.named_parameters()).keys() == dict(old.named_parameters()).keys()


def test_a_linear_with_biases_is_left_alone(o3):
    assert not layers.Linear.replaces(o3.Linear("2x0e", "3x0e", biases=True))


@pytest.mark.parametrize("irreps_out", [IRREPS, "4x0e"])
def test_product_with_species(o3, irreps_out):
    old = o3.FullyConnectedTensorProduct(IRREPS, "6x0e", irreps_out)
    assert layers.SpeciesProduct.replaces(old)
    new = layers.SpeciesProduct(old)
    species = torch.nn.functional.one_hot(torch.tensor([4, 0, 4, 5, 0]), 6).double()
    x = torch.randn(5, old.irreps_in1.dim)
    found = (
        second_derivatives(lambda x, layer=layer: layer(x, species), [layer.weight], x)
        for layer in (old, new)
    )
    assert_same(*found)


def graph(kind):
    """Return source, center and the number of atoms."""
    if kind == "regular":
        center = torch.arange(6).repeat_interleave(4)
        return torch.randint(6, (24,)), center, 6
    if kind == "no edges":
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), 3
    center = torch.cat([torch.zeros(13, dtype=torch.long), torch.randint(1, 8, (20,))])
    if kind == "unordered":
        center = center[torch.randperm(33)]
    return torch.randint(9, (33,)), center, 9  # the last atom has no neighbours


@pytest.mark.parametrize("kind", ["regular", "irregular", "unordered", "no edges"])
def test_convolution(o3, kind):
    source, center, n = graph(kind)
    harmonics = o3.Irreps.spherical_harmonics(2)
    middle, instructions = [], []
    for i, (mul, ir_in) in enumerate(o3.Irreps(IRREPS)):
        for j, (_, ir_filter) in enumerate(harmonics):
            for ir_out in ir_in * ir_filter:
                if ir_out.l <= 2:
                    instructions.append((i, j, len(middle), "uvu", True))
                    middle.append((mul, ir_out))
    old = o3.TensorProduct(
        IRREPS,
        harmonics,
        o3.Irreps(middle),
        instructions,
        shared_weights=False,
        internal_weights=False,
    )
    assert layers.Convolution.replaces(old)
    new = layers.Convolution(old, torch.float64)

    def plain(x, y, w):
        message = old(x[source], y, w)
        return message.new_zeros(n, message.shape[1]).index_add(0, center, message)

    def rewritten(x, y, w):
        return new(x, y, w, source, center)

    x = torch.randn(n, o3.Irreps(IRREPS).dim)
    y, w = (torch.randn(len(center), k) for k in (harmonics.dim, old.weight_numel))
    assert_same(*(second_derivatives(f, [], x, y, w) for f in (plain, rewritten)))


def test_rows_cover_every_edge_once():
    for kind in ("regular", "irregular", "unordered"):
        _, center, n = graph(kind)
        rows, places, owners = layers.edge_rows(center, n)
        edge_of = torch.arange(len(center)) if rows is None else rows
        assert torch.equal(edge_of[places], torch.arange(len(center)))
        width = len(edge_of) // (n if owners is None else len(owners))
        row = places // width
        assert torch.equal(row if owners is None else owners[row], center)
        if rows is not None:
            assert int((rows == len(center)).sum()) == len(rows) - len(center)
