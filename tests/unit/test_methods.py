"""Every method on a small model written by hand: equation, gradients, start, phases."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from pathtune import delta as deltas
from pathtune import discovery
from pathtune.errors import UsageError
from pathtune.methods import dense, frozen, full, scratch, sparse, sparse_naive
from pathtune.methods import random_support as random_
from pathtune.methods import top_magnitude as top
from pathtune.training import optimizer
from tests.reference import changes as twin
from tests.reference import path_weights

TWINS = {
    "dense": twin.free,
    "frozen": twin.nothing,
    "full": twin.free,
    "gradual": twin.free,
    "random_support": twin.on_support,
    "scratch": twin.free,
    "sparse": twin.thresholded,
    "sparse_naive": twin.thresholded,
    "top_magnitude": twin.free,
}
FACTORS = {"elora", "lora"}  # these have a test module of their own
PHASES = {"gradual", "sparse", "sparse_naive", "top_magnitude"}
TOTAL = sum(w.size for w in path_weights.small())


def change(name, *, seed=0, **options):
    """Return the change of a method on all weights that it covers."""
    method = importlib.import_module(f"pathtune.methods.{name}")
    return method.Change(
        method.Config(**options),
        [t for t in path_weights.targets() if method.Change.covers(t.weight)],
        total_parameters=TOTAL,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )


def trained(name, **options):
    """Return a change whose trainable numbers are anywhere, as after a training."""
    module = change(name, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if hasattr(module, "tau"):
            module.tau.sub_(1)
    return module


def to_last_phase(module):
    """Go through all phases of a method."""
    while module.phase_pending:
        module.begin_phase()


def state(module):
    """Return a module's numbers as plain lists."""
    numbers = {name: t.tolist() for name, t in module.state_dict().items()}
    return numbers | {"sizes": [t.size for t in module.targets]}


def test_every_method_is_here():
    assert {*TWINS, *FACTORS} == set(discovery.names("methods"))


@pytest.mark.parametrize("name", TWINS)
def test_the_change_is_the_plain_twins(name):
    module = trained(name)
    parts = module()
    assert [len(p) for p in parts] == [t.size for t in module.targets]
    plain = TWINS[name](**state(module))
    assert torch.cat(parts).tolist() == pytest.approx(plain, rel=1e-14, abs=1e-15)
    assert any(plain) or name == "frozen"


@pytest.mark.parametrize("name", sorted(PHASES))
def test_the_change_of_the_second_phase_is_the_plain_twins(name):
    module = trained(name, max_updated_percent=20.0)
    to_last_phase(module)
    with torch.no_grad():
        module.delta.add_(0.5)
    plain = twin.on_support(**state(module))
    assert torch.cat(module()).tolist() == plain
    assert sum(x != 0 for x in plain) == int(0.2 * TOTAL)


@pytest.mark.parametrize(
    ("name", "second"),
    [(n, False) for n in sorted({*TWINS, *FACTORS} - {"frozen"})]
    + [(n, True) for n in sorted(PHASES)],
)
def test_gradcheck(name, second):
    module = trained(name, **({"max_updated_percent": 20.0} if second else {}))
    if second:
        to_last_phase(module)
    trainable = dict(module.named_parameters())
    if not second and "tau" in trainable:
        distance = module.delta.abs() - torch.sigmoid(module.tau).max()
        assert distance.abs().min() > 1e-5, "the kink is out of reach"

    def merged(*values):
        names = dict(zip(trainable, values, strict=True))
        return torch.cat(torch.func.functional_call(module, names, ()))

    assert torch.autograd.gradcheck(merged, tuple(trainable.values()))


@pytest.mark.parametrize("name", sorted({*TWINS, *FACTORS}))
def test_the_seed_decides_the_start(name):
    first, again, other = (torch.cat(change(name, seed=s)()) for s in (0, 0, 1))
    assert torch.equal(first, again)
    module = change(name)
    assert module.is_zero_at_start == (not first.any())
    if not module.is_zero_at_start:
        assert not torch.equal(first, other)


@pytest.mark.parametrize("name", sorted({*TWINS, *FACTORS}))
def test_the_groups_are_the_parameters(name):
    module = change(name)
    grouped = [p for group in module.param_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in module.parameters()}
    for group in module.param_groups():
        assert group["lr"] > 0
        assert group["weight_decay"] >= 0


# Dense, full


def test_dense_is_full_on_other_weights_with_another_rate():
    assert (dense.Config.select, full.Config.select) == ("all", "everything")
    assert (dense.Config().lr, full.Config().lr) == (sparse.Config().lr, 1e-3)
    assert issubclass(dense.Change, full.Change)


# Naive sparse


def test_naive_differs_from_sparse_in_the_groups_alone():
    naive, decoupled = change("sparse_naive"), change("sparse")
    naive.load_state_dict(decoupled.state_dict())
    assert torch.equal(torch.cat(naive()), torch.cat(decoupled()))
    (group,) = naive.param_groups()
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.01)
    assert sparse_naive.PRESETS.keys() == sparse.PRESETS.keys()


@pytest.mark.parametrize(
    ("name", "decay", "left"),
    [("sparse", "tau_weight_decay", 1.0), ("sparse_naive", "weight_decay", 0.302)],
)
def test_decay_of_the_threshold_pulls_a_naive_change_to_zero(name, decay, left):
    module = change(name, init_std=1.0, **{decay: 1.0})
    before = module.delta.detach().norm()
    opt = optimizer.build(module.param_groups(), 0)
    for _ in range(200):
        for parameter in optimizer.parameters(opt):
            parameter.grad = torch.zeros_like(parameter)
        opt.step()
    opt.eval()
    # Without a gradient 1F1(10; 2; -s/10) is left, 0.302 at s = 200 steps x 0.01.
    assert (module.delta.detach().norm() / before).item() == pytest.approx(
        left, abs=0.1
    )


# Supports


def test_top_magnitude_keeps_what_moved_furthest():
    module = trained("top_magnitude", max_updated_percent=10.0)
    before = torch.cat(module())
    assert not module.phase_due(0.59)
    assert module.phase_due(0.6)
    module.begin_phase()
    after = torch.cat(module())
    kept = after != 0
    assert kept.sum() == module.trainable == int(0.1 * TOTAL)
    assert torch.equal(after[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    (group,) = module.param_groups()
    share = module.trainable / len(module.support)
    assert group["lr"] == pytest.approx(top.Config().lr / share**0.5)


def test_gradual_shrinks_by_the_cubic_schedule_to_the_bound():
    module = trained("gradual", max_updated_percent=10.0, stages=3)
    n, end = len(module.support), int(0.1 * TOTAL)
    rates = [module.param_groups()[0]["lr"]]
    shares = [module.phase_share]
    for step in range(1000):
        while module.phase_due(step / 1000):
            before = torch.cat(module())
            module.begin_phase()
            kept = torch.cat(module()) != 0
            left = end + round((n - end) * (1 - len(rates) / 3) ** 3)
            assert int(kept.sum()) == module.trainable == left
            assert before[kept].abs().min() >= before[~kept].abs().max()
            rates.append(module.param_groups()[0]["lr"])
            shares.append(module.phase_share)
            assert rates[-1] == pytest.approx(0.01 * (n / left) ** 0.5)
    assert left == end
    assert not module.phase_pending
    assert shares == pytest.approx([0.1, 0.25, 0.25, 0.4])


def test_random_support_is_drawn_once_and_evenly():
    counts = torch.zeros(len(torch.cat(change("random_support")())))
    for seed in range(200):
        module = change("random_support", seed=seed, max_updated_percent=20.0)
        assert module.trainable == int(0.2 * TOTAL)
        assert not module.phase_pending
        counts += module.support
    expected = 200 * int(0.2 * TOTAL) / len(counts)
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_only_the_support_moves():
    module = change("random_support", max_updated_percent=20.0)
    opt = optimizer.build(module.param_groups(), 0)
    for _ in range(3):
        opt.zero_grad()
        (torch.cat(module()) - 1).square().sum().backward()
        opt.step()
    assert torch.equal(torch.cat(module()) != 0, module.support)


def test_a_support_larger_than_the_selection_is_all_of_it():
    module = change("random_support", max_updated_percent=100.0)
    assert module.support.all()


@pytest.mark.parametrize("method", [random_, top, sparse])
def test_a_bound_below_one_entry_is_refused(method):
    name = method.__name__.rpartition(".")[2]
    with pytest.raises(UsageError, match=f"of {TOTAL} parameters is not one entry"):
        change(name, max_updated_percent=50 / TOTAL)


@pytest.mark.parametrize("name", sorted({*PHASES, "random_support"}))
def test_a_support_survives_a_state_dict(name):
    options = {"max_updated_percent": 20.0}
    module, other = trained(name, **options), change(name, seed=3, **options)
    to_last_phase(module)
    other.load_state_dict(module.state_dict())
    assert not other.phase_pending
    assert other.trainable == module.trainable
    assert torch.equal(torch.cat(module()), torch.cat(other()))


# Scratch


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("interactions.1.linear.weight", 1.0),
        ("interactions.0.skip_tp.weight", 1.0),
        ("products.0.symmetric_contractions.contractions.1.weights_max", 1 / 51),
        ("interactions.1.conv_tp_weights.layer2.weight", 0.3),
        ("radial_embedding.bessel", None),
    ],
)
def test_how_scratch_draws_each_kind(name, std):
    weights = path_weights.mace_off23_medium(simplified=False)
    base = path_weights.values(weights, std=0.3)
    delta = deltas.build(
        weights, base, method=scratch, config=scratch.Config(),
        selection=f"name={name}", elements=("H", "O"), head=None, seed=0,
    )  # fmt: skip
    (target,) = delta.targets
    merged = delta()[name].detach().flatten()
    drawn, before = merged[target.indices], base[name].flatten()[target.indices]
    if std is None:
        assert torch.equal(drawn, before)
        return
    assert drawn.mean().abs() < 0.05 * std
    assert drawn.std().item() == pytest.approx(std, rel=0.05)
    correlation = np.corrcoef(drawn, before)[0, 1]
    assert abs(correlation) < 0.05, "nothing of the pre-training is left"
    dead = np.setdiff1d(np.arange(merged.numel()), target.indices)
    assert torch.equal(merged[dead], base[name].flatten()[dead])


def test_scratch_never_touches_scales_and_shifts():
    assert scratch.Config.select == "everything"  # which leaves out scale_shift
    assert "weight_decay" not in scratch.Config().model_dump()
    (group,) = change("scratch").param_groups()
    assert group["weight_decay"] == 0


# Frozen


def test_frozen_has_nothing_to_train():
    module = change("frozen")
    assert module.trainable == 0
    assert module.param_groups() == []
    assert not frozen.Config().model_dump()
    opt = optimizer.build(module.param_groups(), 0)
    assert optimizer.parameters(opt) == []
    with optimizer.averaged(opt):
        assert not torch.cat(module()).any()
