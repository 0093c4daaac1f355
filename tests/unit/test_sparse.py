"""The sparse method against its plain twin, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathtune.methods import base, full, sparse
from pathtune.paths import Path, PathWeight
from pathtune.training import optimizer
from tests.reference import str_step as twin

SIZES = (6, 4)


def targets():
    first = PathWeight(
        "a", (6,), "linear", "interaction", 0,
        (Path(0, 2, (1, 2), "0e", "0e"), Path(2, 6, (2, 2), "1o", "1o")),
    )  # fmt: skip
    second = PathWeight("b", (2, 3), "radial", "interaction", 1)
    return [
        base.Target(first, np.arange(6), torch.ones(6)),
        base.Target(second, np.array([0, 1, 3, 5]), torch.ones(4)),
    ]


def change(method=sparse, **options):
    return method.Change(
        method.Config(**options),
        targets(),
        total_parameters=20,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=20),
    st.floats(1e-4, 0.9),
)
def test_soft_threshold_is_the_papers(values, threshold):
    ours = sparse.soft_threshold(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(threshold, dtype=torch.float64),
    )
    assert ours.tolist() == pytest.approx(
        twin.soft_threshold(values, threshold), abs=1e-12
    )


def test_gradients_are_the_papers():
    module = change(init_std=0.5, initial_threshold=0.2)
    upstream = torch.randn(10, dtype=torch.float64)
    (torch.cat(module()) * upstream).sum().backward()
    start = 0
    for index, size in enumerate(SIZES):
        part = slice(start, start + size)
        by_delta, by_tau = twin.gradients(
            module.delta[part].tolist(),
            module.tau[index].item(),
            upstream[part].tolist(),
        )
        assert module.delta.grad[part].tolist() == pytest.approx(by_delta, abs=1e-12)
        assert module.tau.grad[index].item() == pytest.approx(by_tau, abs=1e-12)
        start += size
    assert (module.delta.grad == 0).any(), "some entries are pruned in this test"


def test_gradcheck_away_from_the_kink():
    module = change(init_std=0.5, initial_threshold=0.2)
    distance = (module.delta.abs() - 0.2).abs()
    assert distance.min() > 1e-4

    def merged(delta, tau):
        return torch.func.functional_call(module, {"delta": delta, "tau": tau}, ())

    assert torch.autograd.gradcheck(merged, (module.delta, module.tau))


def test_pruned_entries_get_exactly_zero_gradient():
    module = change(init_std=1e-3, initial_threshold=0.5)
    (torch.cat(module()) ** 2 + torch.cat(module())).sum().backward()
    assert torch.count_nonzero(module.delta.grad) == 0
    assert torch.count_nonzero(module.tau.grad) == 0


def test_start_is_noise_behind_the_initial_threshold():
    module = change()
    assert not module.is_zero_at_start
    assert module.delta.abs().max() < 0.05
    assert torch.sigmoid(module.tau).tolist() == pytest.approx([1e-3, 1e-3])
    again = change()
    assert torch.equal(module.delta, again.delta), "the seed decides"


def test_one_threshold_for_each_path():
    module = change(tau_per="path")
    assert module.tau.shape == (3,)
    assert {n: len(t) for n, t in module.thresholds().items()} == {"a": 2, "b": 1}
    with torch.no_grad():
        module.delta.fill_(0.3)
        module.tau[1] = 10.0  # threshold near one: only the path 1o -> 1o vanishes
    first, second = module()
    assert (first[:2] > 0).all()
    assert (first[2:] == 0).all()
    assert (second > 0).all()


def test_full_is_zero_at_the_start_and_linear():
    module = change(full)
    assert module.is_zero_at_start
    assert all(torch.count_nonzero(part) == 0 for part in module())
    assert [len(part) for part in module()] == list(SIZES)


def test_two_groups_with_their_own_rates_and_decays():
    module = change(lr=0.02, tau_lr=0.5, tau_weight_decay=0.3, weight_decay=1e-8)
    delta, tau = module.param_groups()
    assert (delta["lr"], delta["weight_decay"]) == (0.02, 1e-8)
    assert (tau["lr"], tau["weight_decay"]) == (0.5, 0.3)
    assert module.param_groups()[1]["params"][0] is module.tau
    assert change(lr=0.02).param_groups()[1]["lr"] == 0.02, "the same rate by default"


@pytest.mark.parametrize("warmup", [0, 3])
def test_optimizer_follows_schedule_free_adamw_with_decoupled_decay(warmup):
    module = change(lr=0.01, tau_weight_decay=0.3)
    opt = optimizer.build(module.param_groups(), warmup)
    twins = [twin.ScheduleFree(v, 0.01, 1e-8, warmup) for v in module.delta.tolist()]
    taus = [twin.ScheduleFree(v, 0.01, 0.3, warmup) for v in module.tau.tolist()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        for parameter, copies in ((module.delta, twins), (module.tau, taus)):
            gradient = torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
            parameter.grad = gradient.clone()
            for copy, g in zip(copies, gradient.tolist(), strict=True):
                copy.step(g)
        opt.step()
        assert module.tau.tolist() == pytest.approx([c.y for c in taus], abs=1e-10)
        with optimizer.averaged(opt):
            assert module.delta.tolist() == pytest.approx(
                [c.x for c in twins], abs=1e-10
            )


def test_decay_alone_raises_the_threshold_along_the_closed_form():
    """METHOD: without a net force τ_x = τ_0 1F1(10; 2; -0.1 s), s = Σ η λ."""
    special = pytest.importorskip("scipy.special")
    module = change(lr=0.01, tau_weight_decay=0.3)
    start = module.tau[0].item()
    opt = optimizer.build(module.param_groups(), 0)
    for _ in range(400):
        module.delta.grad = torch.zeros_like(module.delta)
        module.tau.grad = torch.zeros_like(module.tau)
        opt.step()
    with optimizer.averaged(opt):
        expected = start * special.hyp1f1(10, 2, -0.1 * 400 * 0.01 * 0.3)
        assert module.tau[0].item() == pytest.approx(expected, rel=0.01)


def test_averaged_puts_the_training_iterate_back_bit_for_bit():
    module = change()
    opt = optimizer.build(module.param_groups(), 0)
    for _ in range(5):
        module.delta.grad = torch.randn_like(module.delta)
        module.tau.grad = torch.randn_like(module.tau)
        opt.step()
    before = [p.detach().clone() for p in optimizer.parameters(opt)]
    with optimizer.averaged(opt):
        assert not torch.equal(module.delta, before[0])
        with pytest.raises(Exception, match="train mode"):
            opt.step()
    after = optimizer.parameters(opt)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(group["train_mode"] for group in opt.param_groups)


def test_a_bound_fixes_the_largest_survivors_and_drops_the_threshold():
    module = change(init_std=0.5, initial_threshold=0.1, max_updated_percent=25.0)
    assert module.phase_pending
    assert not module.phase_due(0.59)
    assert module.phase_due(0.6)
    before = torch.cat(module())
    module.begin_phase()
    after = torch.cat(module())
    kept = after != 0
    assert kept.sum() == 5, "a quarter of all 20 parameters"
    assert torch.equal(after[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    assert module.thresholds() == {}
    assert not module.phase_pending
    (group,) = module.param_groups()
    opt = optimizer.build([group], 0)
    for _ in range(3):
        opt.zero_grad()
        (torch.cat(module()) - 1).square().sum().backward()
        opt.step()
    moved = torch.cat(module())
    assert torch.equal(moved != 0, kept), "nothing outside the support moves"
    assert (moved[kept] != after[kept]).all()


def test_a_bound_above_the_survivors_keeps_them_all():
    module = change(init_std=0.5, initial_threshold=0.4, max_updated_percent=100.0)
    survivors = torch.cat(module()) != 0
    assert 0 < survivors.sum() < 10
    module.begin_phase()
    assert torch.equal(torch.cat(module()) != 0, survivors)


def test_the_phase_survives_a_state_dict():
    module, other = change(max_updated_percent=10.0), change(max_updated_percent=10.0)
    module.begin_phase()
    other.load_state_dict(module.state_dict())
    assert not other.phase_pending
    assert torch.equal(torch.cat(module()), torch.cat(other()))
