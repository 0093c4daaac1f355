"""ELoRA and LoRA: published counts, and products against their plain twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pathtune import delta as deltas
from pathtune.errors import UsageError
from pathtune.methods import elora, lora, low_rank
from tests.reference import low_rank as twin
from tests.reference import path_weights

FORMS = [elora, lora]


def change(method, targets=None, **options):
    """Return a change of the small model's covered weights, A and B random."""
    targets = path_weights.targets() if targets is None else targets
    covered = [t for t in targets if method.Change.covers(t.weight)]
    module = method.Change(
        method.Config(**options),
        covered,
        total_parameters=100,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def build(method, weights, elements=None, selection=None, **options):
    config = method.Config(**options)
    return deltas.build(
        weights,
        path_weights.values(weights),
        method=method,
        config=config,
        selection=selection or config.select,
        elements=elements or weights[0].elements,
        head=None,
        seed=0,
    )


# Published counts


@pytest.mark.parametrize(
    ("weights", "total", "trainable"),
    [
        (path_weights.mace_off23_medium(simplified=True), 751_896, 175_880),
        (path_weights.mace_mp_l2(), 723_866, 176_666),
    ],
    ids=["OFF23 medium", "MP-0 L2"],
)
def test_elora_trains_as_many_numbers_as_published(weights, total, trainable):
    assert sum(w.size for w in weights) == total
    assert build(elora, weights).change.trainable == trainable


@pytest.mark.parametrize(("rank", "trainable"), [(4, 29_396), (16, 117_584)])
def test_lora_trains_as_many_numbers_as_the_vendors(rank, trainable):
    weights = path_weights.mace_off23_medium(simplified=False)
    assert build(lora, weights, rank=rank).change.trainable == trainable


def test_without_an_element_there_is_less_to_train():
    weights = path_weights.mace_off23_medium(simplified=True)
    three = build(elora, weights).change.trainable
    two = build(elora, weights, elements=("H", "O")).change.trainable
    # A row for each channel and element in five tensor-product paths, an embedding row,
    # the couplings of the highest order, and the free couplings of lower orders.
    assert three - two == 16 * (5 * 128 + 1 + 23 + 51 + 23) + 128 * (5 + 7 + 5)


# Products


def entry_by_entry(method, module):
    """Yield dW of each target from its A and B with nothing but loops.

    A has a row for each place along all axes but the last that has an alive entry.
    """
    for target, part in zip(module.targets, module.parts, strict=True):
        weight = target.weight
        if isinstance(part, low_rank.Free):
            yield part.delta.tolist()
            continue
        rank, alpha = module.config.rank, module.config.alpha
        is_e3nn_lora = method is lora and weight.is_flat
        scale = alpha / rank**1.5 if is_e3nn_lora else alpha / rank
        shared = method is lora and weight.kind == "linear"
        alive, result = set(target.indices.tolist()), []
        used_a, used_b = {}, {}
        for number, path in enumerate(weight.paths or (None,)):
            start, shape = (path.start, path.shape) if path else (0, weight.shape)
            n_columns = shape[-1]
            n_rows = int(np.prod(shape[:-1]))
            places = [
                [start + i * n_columns + j for j in range(n_columns)]
                for i in range(n_rows)
            ]
            rows = [row for row in places if alive & set(row)]
            key_a, key_b = (path.block_in, path.block_out) if shared else (number,) * 2
            a = part.a[used_a.setdefault(key_a, len(used_a))].tolist()
            b = part.b[used_b.setdefault(key_b, len(used_b))].tolist()
            for row, line in zip(rows, twin.product(a, b, scale), strict=True):
                result += [x for k, x in zip(row, line, strict=True) if k in alive]
        yield result


@pytest.mark.parametrize("method", FORMS)
def test_merged_weights_are_the_block_products(method):
    module = change(method, rank=2, alpha=3.0)
    expected = list(entry_by_entry(method, module))
    assert len(expected) == len(module.targets)
    for target, ours, plain in zip(module.targets, module(), expected, strict=True):
        assert ours.shape == (target.size,)
        assert ours.tolist() == pytest.approx(plain, rel=1e-14, abs=1e-14)


@pytest.mark.parametrize("method", FORMS)
def test_gradients_are_those_of_the_plain_twin(method):
    module = change(method, rank=2, alpha=3.0)
    index = [t.weight.name for t in module.targets].index("embedding")
    part = module.parts[index]
    upstream = torch.randn(2, 4, dtype=torch.float64)
    (part().view(2, 4) * upstream).sum().backward()
    (a,), (b,) = part.a, part.b
    by_a, by_b = twin.gradients(a.tolist(), b.tolist(), part.scale, upstream.tolist())
    assert np.allclose(a.grad, by_a, rtol=1e-13, atol=0)
    assert np.allclose(b.grad, by_b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", FORMS)
def test_absent_elements_stay_where_they_are(method):
    weights = path_weights.small()
    base = path_weights.values(weights)
    delta = build(method, weights, path_weights.PRESENT, "everything", rank=2)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(1.0)
    alive = {t.weight.name: t.indices for t in path_weights.targets()}
    merged = delta()
    assert set(merged) == covered(method)
    for name, weight in merged.items():
        moved = torch.nonzero((weight != base[name]).flatten()).flatten()
        assert moved.tolist() == alive[name].tolist()
    assert len(alive["fctp"]) == (2 * 4 + 3 * 2) * len(path_weights.PRESENT)
    rows = [p.shape[0] for p in delta.change.parts[0].a]
    assert rows == [2], "A has a row for each present element, none for carbon"


# What is covered, and how it starts


def covered(method):
    return {w.name for w in path_weights.small() if method.Change.covers(w)}


def test_what_each_form_changes():
    everything = {w.name for w in path_weights.small()}
    assert covered(elora) == everything - {"bias"}
    assert covered(lora) == {"embedding", "linear", "fctp", "radial"}
    low = {w.name for w in path_weights.small() if elora.Change.is_low_rank(w)}
    assert low - {"bias"} == everything - {"bias", "weights.0", "bessel"}


@pytest.mark.parametrize(
    ("method", "name", "std"),
    [
        (elora, "interactions.1.linear.weight", 1.0),
        (elora, "interactions.0.skip_tp.weight", 1.0),
        (elora, "interactions.1.conv_tp_weights.layer3.weight", 1.0),
        (elora, "products.0.symmetric_contractions.contractions.1.weights_max", 1 / 51),
        (lora, "interactions.1.linear.weight", 1.0),
        (lora, "interactions.1.conv_tp_weights.layer2.weight", 1e-3),
    ],
)
def test_the_start(method, name, std):
    weights = path_weights.mace_off23_medium(simplified=False)
    delta = build(method, weights, selection=f"name={name}")
    (part,) = delta.change.parts
    a = torch.cat([p.detach().flatten() for p in part.a])
    assert a.dtype == torch.float64
    assert a.std().item() == pytest.approx(std, rel=0.15)
    assert a.mean().abs().item() < 0.2 * std
    assert not any(p.any() for p in part.b)
    assert not torch.cat(delta.change()).any()


def test_defaults_are_the_published_ones():
    a, b = elora.Config(), lora.Config()
    assert (a.rank, a.alpha, a.lr, a.weight_decay) == (16, 16, 5e-3, 1e-8)
    assert (b.rank, b.alpha, b.lr, b.weight_decay) == (4, 1, 1e-2, 0)
    linear = path_weights.small()[1]
    assert change(elora).scale(linear) == 1
    assert change(lora).scale(linear) == pytest.approx(1 / 8)
    assert change(lora).scale(path_weights.small()[6]) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("method", "n_a", "n_b"), [(lora, 2, 2), (elora, 3, 3)])
def test_factors_of_three_paths_between_two_blocks_each(method, n_a, n_b):
    """LoRA has an A of each input and a B of each output, ELoRA both of each path."""
    (linear,) = [t for t in path_weights.targets() if t.weight.name == "linear"]
    (part,) = change(method, [linear]).parts
    assert (len(part.a), len(part.b)) == (n_a, n_b)


def test_a_selection_without_covered_weights_is_refused():
    with pytest.raises(UsageError, match="'lora' changes nothing") as refused:
        build(lora, path_weights.small(), path_weights.PRESENT, "contraction")
    assert "it can change fctp, linear, radial" in str(refused.value)
