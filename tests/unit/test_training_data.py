"""Batches by work, accumulated gradients, and the order of the steps."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pathtune.config import RunConfig
from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import Structure
from pathtune.structures import survey
from pathtune.training import memory, optimizer
from pathtune.training.data import Batch, Frames, Order, Source
from pathtune.training.loop import backward, training_step
from tests.conftest import crystals, molecules
from tests.unit.test_training_parts import structure

CPU = torch.device("cpu")


class Springs:
    """A stand-in for a backend: energies, forces, stresses from one weight each."""

    properties = frozenset({"energy", "forces", "stress"})
    device = CPU

    def __init__(self, dtype=torch.float64):
        self.dtype = dtype

    def graph(self, atoms):
        positions = torch.from_numpy(atoms.positions).to(self.dtype)
        return {"positions": positions, "edge_index": np.zeros((2, 7 * len(atoms)))}

    def n_edges(self, graph):
        return graph["edge_index"].shape[1]

    def batch(self, graphs):
        return [g["positions"] for g in graphs]

    def predict(self, batch, weights, properties, *, training=False):
        w = weights["w"]
        squares = [(p**2).sum(0) for p in batch]
        return {
            "energy": torch.stack([(w[0] * s).sum().tanh() for s in squares]),
            "forces": torch.cat([(w[1] * p).sin() for p in batch]),
            "stress": torch.stack([w[2] * torch.cat([s, s.cos()]) for s in squares]),
        }


class Weight(nn.Module):
    """A stand-in for a delta."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, 0.5, 0.7], dtype=dtype))

    def forward(self):
        return {"w": self.w}


def mixed(n=17, seed=0):
    """Structures of 1 to 9 atoms, some labels missing, some of no weight."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        labels = [x for x in ("energy", "forces", "stress") if rng.uniform() < 0.7]
        s = structure(f"H{rng.integers(1, 10)}", labels, weight=float(i % 4))
        made.append(dataclasses.replace(s, source=f"f:{i}"))
    return made


def frames(structures, backend=None, *, edges=True):
    prepared = Frames.prepare(backend or Springs(), structures)
    n_edges = 7 * prepared.survey.n_atoms if edges else prepared.n_edges
    return dataclasses.replace(prepared, n_edges=n_edges)


def config(**settings):
    return RunConfig(model="m", train="t", **settings)


PROPERTIES = {"energy": 1.0, "forces": 10.0, "stress": 3.0}


def gradient(data, rows, passes, dtype):
    delta = Weight(dtype)
    batch = Batch(Source(data, PROPERTIES), rows, [data.part(p) for p in passes])
    loss = backward(delta, [delta.w], batch, config())
    return loss, delta.w.grad


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)]
)
def test_the_parts_of_a_batch_have_the_gradient_of_the_batch(dtype, tolerance):
    data = frames(mixed(), Springs(dtype))
    rows = [3, 16, 0, 7, 8, 1, 12, 5]
    loss, whole = gradient(data, rows, [rows], dtype)
    for size in (1, 2, 3, 5):
        passes = [rows[i : i + size] for i in range(0, len(rows), size)]
        other, parts = gradient(data, rows, passes, dtype)
        assert (parts - whole).abs().max() / whole.abs().max() < tolerance
        assert abs(other - loss) / loss < tolerance
    # Parts on their own would weigh every label of a small part more.
    wrong = sum(gradient(data, [i], [[i]], dtype)[1] for i in rows) / len(rows)
    assert (wrong - whole).abs().max() / whole.abs().max() > 1e-2


def test_steps_in_parts_are_steps(dtype=torch.float64):
    data = frames(mixed())
    ends = []
    for settings in ({}, {"max_atoms_per_batch": 9}, {"max_edges_per_batch": 70}):
        run = config(batch_size=5, **settings)
        order, delta = Order(data, run), Weight()
        opt = optimizer.build([{"params": [delta.w], "lr": 0.01}], 1)
        passes = []
        for step in range(10):
            passes.append(len(order.passes(step)))
            parts = [data.part(rows) for rows in order.passes(step)]
            batch = Batch(Source(data, PROPERTIES), order.rows(step), parts)
            training_step(delta, opt, [batch], run)
        assert (max(passes) > 1) == bool(settings)
        ends.append(delta.w.detach().clone())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_precision_of_products_is_that_of_the_step_alone(tf32):
    seen = []

    class Watched(Springs):
        def predict(self, *args, **options):
            seen.append(torch.get_float32_matmul_precision())
            return super().predict(*args, **options)

    data, delta = frames(mixed(), Watched()), Weight()
    opt = optimizer.build([{"params": [delta.w], "lr": 0.01}], 1)
    batch = Batch(Source(data, PROPERTIES), [0, 1], [data.part([0, 1])])
    before = torch.get_float32_matmul_precision()
    training_step(delta, opt, [batch], config(tf32=tf32))
    assert seen == ["high" if tf32 else before]
    assert torch.get_float32_matmul_precision() == before


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 80),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_passes_keep_the_bounds_and_every_frame(sizes, atoms, edges, most):
    data = frames([structure(f"H{n}", ["energy"]) for n in sizes])
    bounds = config(max_atoms_per_batch=atoms, max_edges_per_batch=edges)
    passes = data.passes(range(len(sizes)), bounds, most)
    assert [i for rows in passes for i in rows] == list(range(len(sizes)))

    def fits(rows):
        n = sum(sizes[i] for i in rows)
        return n <= atoms and 7 * n <= edges and len(rows) <= (most or len(rows))

    assert all(fits(rows) or len(rows) == 1 for rows in passes)
    # No pass could have taken the frame that begins the next one.
    assert not any(fits([*a, b[0]]) for a, b in itertools.pairwise(passes))


def test_without_bounds_a_step_is_one_pass():
    data = frames(mixed(), edges=False)
    order = Order(data, config(batch_size=6))
    assert [len(order.passes(step)) for step in range(5)] == [1] * 5
    assert order.passes(3) == [order.rows(3)]
    assert order.epoch(17) == 6 * 17 / 17 and order.steps(2) == 6


def test_packed_epochs_see_every_frame_once():
    data = frames(mixed(40))
    run = config(max_edges_per_batch=140, seed=3)
    order = Order(data, run)
    n_atoms = data.survey.n_atoms
    last = 0
    epochs = []
    for epoch in (1, 2, 3):
        steps = range(last, last := order.steps(epoch))
        assert order.epoch(last) == epoch
        rows = [order.rows(step) for step in steps]
        assert all(7 * n_atoms[r].sum() <= 140 for r in rows)
        assert sorted(i for r in rows for i in r) == list(range(40))
        epochs.append(rows)
    assert epochs[0] != epochs[1]
    # The step alone decides, in whatever order it is asked for.
    again = Order(data, run)
    assert again.rows(last - 1) == epochs[2][-1]
    assert again.rows(0) == epochs[0][0]
    assert again.passes(5) == [again.rows(5)]
    other = Order(data, config(max_edges_per_batch=140, seed=4))
    assert other.rows(0) != again.rows(0)


def test_the_shares_of_several_processes_are_the_batch(monkeypatch):
    data = frames(mixed(40))
    order = Order(data, config(batch_size=16))
    shares = []
    for rank in range(3):
        monkeypatch.setattr("pathtune.training.distributed.rank", lambda r=rank: r)
        monkeypatch.setattr("pathtune.training.distributed.size", lambda: 3)
        shares.append([i for rows in order.passes(2) for i in rows])
    assert sorted(itertools.chain(*shares)) == sorted(order.rows(2))
    work = [data.survey.n_atoms[share].sum() for share in shares]
    assert max(work) - min(work) <= 9


class Grown:
    """A stand-in for a device whose memory grows with the work."""

    def __init__(self, monkeypatch, n_edges, base=100.0, per_edge=0.5, out_at=1e9):
        self.n_edges, self.peak, self.passes = np.asarray(n_edges), base, []
        self.base, self.per_edge, self.out_at = base, per_edge, out_at
        monkeypatch.setattr(memory, "_forget_peak", self.forget)
        monkeypatch.setattr(memory, "peak_mib", lambda device: self.peak)

    def forget(self, device):
        self.peak = self.base

    def compute(self, rows):
        edges = int(self.n_edges[rows].sum())
        self.passes.append(edges)
        self.peak = self.base + self.per_edge * edges
        if self.peak > self.out_at:
            raise torch.OutOfMemoryError("simulated")

    def most(self, limit, most=10**9):
        return memory.most_edges(
            self.compute, self.n_edges, most=most, device=CPU, limit=limit
        )


def test_the_probe_finds_what_fits_without_exceeding_it(monkeypatch):
    device = Grown(monkeypatch, [100, 250, 40, 10])
    assert device.most(limit=1000) == 1800
    assert max(device.passes) * 0.5 + 100 <= 1000
    assert Grown(monkeypatch, [100, 250]).most(limit=1000, most=600) == 600
    assert Grown(monkeypatch, [0, 0]).most(limit=1000, most=4) == 4


def test_the_probe_survives_running_out_of_memory(monkeypatch):
    device = Grown(monkeypatch, [100, 250], out_at=700)
    assert 0.25 * 1200 <= device.most(limit=1e6) <= 1200


def test_a_frame_that_cannot_fit(monkeypatch):
    with pytest.raises(PathtuneError, match=r"largest frame \(1000 edges\) alone"):
        Grown(monkeypatch, [10, 1000]).most(limit=400)


def test_a_cpu_has_to_be_told_its_memory():
    with pytest.raises(UsageError, match="--memory-limit"):
        memory.limit_mib(CPU, None)
    assert memory.limit_mib(CPU, 2.0) == 0.9 * 2048


def test_the_peak_is_that_of_what_was_computed():
    memory._forget_peak(CPU)
    before = memory.peak_mib(CPU)
    torch.ones(40 * 2**18).sum()
    assert 30 < memory.peak_mib(CPU) - before < 60
    memory._forget_peak(CPU)
    assert abs(memory.peak_mib(CPU) - before) < 10


def test_labelled_rows_are_those_of_the_loss():
    from pathtune.training.loss import collate, labels_of

    structures = [*mixed(), Structure(molecules(1)[0]), Structure(crystals(1)[0])]
    labels = collate([labels_of(s, {}) for s in structures])
    counted = {n: int(survey(structures).rows(n).sum()) for n in PROPERTIES}
    for name, rows in counted.items():
        assert rows == int((getattr(labels, f"{name}_weight") > 0).sum())
