"""The delta file: exactness, format, algebra and damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pathtune.deltafile import DeltaFile, compare, exact_change, fingerprint
from pathtune.errors import PathtuneError


def weights(seed=0, size=40):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(size, generator=generator),
        "b.weight": torch.randn(5, 8, generator=generator),
        "c.frozen": torch.randn(3, generator=generator),
    }


def make(base, share=0.3, seed=1, scale=1.0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in ("a.weight", "b.weight"):
        noise = scale * torch.randn(base[name].shape, generator=generator)
        kept = torch.rand(base[name].shape, generator=generator) < share
        changes[name] = exact_change(base[name], base[name] + noise * kept)
    meta = {"model": "toy", "base": fingerprint(base), "elements": ["H"], **metadata}
    return DeltaFile(changes, {"H": -0.1, "O": 1 / 3}, meta)


def same(a, b):
    return all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)


@given(st.integers(0, 200), st.floats(1e-6, 1e3), st.floats(0, 1))
def test_apply_then_remove_restores_the_base_bit_for_bit(seed, scale, share):
    base = weights(seed)
    delta = make(base, share=share, seed=seed + 1, scale=scale)
    tuned = {**base, **delta.apply(base)}
    assert same(base, delta.remove(tuned))


@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_float64_rounds_of_a_difference_is_kept(tmp_path, dtype, share):
    """Weights in float64, and weights that decayed to almost nothing in training."""
    base = {n: t.to(dtype) for n, t in weights().items()}
    base["a.weight"] *= 1e-24
    tuned = {n: t.clone() for n, t in base.items()}
    generator = torch.Generator().manual_seed(1)
    for name in ("a.weight", "b.weight"):
        kept = torch.rand(base[name].shape, generator=generator) < share
        tuned[name] += 0.01 * kept * torch.randn(base[name].shape, generator=generator)
    changes = {n: exact_change(base[n], tuned[n]) for n in ("a.weight", "b.weight")}
    assert changes["a.weight"].remainder is not None
    path = tmp_path / "delta.safetensors"
    DeltaFile(changes, {}, {"model": "toy", "base": fingerprint(base)}).save(path)
    delta = DeltaFile.load(path)
    merged = {**base, **delta.apply(base)}
    restored = delta.remove(tuned)
    for name in base:
        assert torch.equal(merged[name], tuned[name])
        assert torch.equal(restored[name], base[name])
    assert delta.updated_parameters == sum(
        int((tuned[n] != base[n]).sum()) for n in base
    )
    with pytest.raises(PathtuneError, match=r"a\.weight\.remainder"):
        rewrite(path, **{"a.weight.remainder": torch.zeros(1)})
        DeltaFile.load(path)


def test_only_changed_entries_are_counted():
    base = weights()
    tuned = base["a.weight"].clone()
    tuned[3] += 1
    tuned[7] += 1e-12  # rounds away: not an update
    change = exact_change(base["a.weight"], tuned)
    assert change.indices.tolist() == [3]
    assert make(base, share=0.0).updated_parameters == 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.95])
def test_file_round_trip_and_equal_bytes(tmp_path, share):
    base = weights()
    delta = make(base, share=share)
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    delta.save(first)
    delta.save(second)
    assert first.read_bytes() == second.read_bytes()
    loaded = DeltaFile.load(first)
    assert loaded.shifts == delta.shifts
    assert loaded.metadata == delta.metadata
    assert same(delta.apply(base), loaded.apply(base))
    assert list(tmp_path.glob(".*")) == [], "no temporary file is left"
    kinds = {key.rpartition(".")[2] for key in load_file(first)}
    assert kinds == ({"dense"} if share > 0.9 else {"indices", "values"})


def test_another_base_is_refused_naming_the_first_difference():
    base = weights()
    other = {**base, "c.frozen": base["c.frozen"] + 1}
    with pytest.raises(PathtuneError, match=r"'toy'.*'c\.frozen'"):
        make(base).apply(other)
    with pytest.raises(PathtuneError, match=r"'b\.weight'"):
        make(base).apply({**other, "b.weight": base["b.weight"].flatten()})


def test_add_subtract_scale():
    base = weights()
    a, b = make(base, seed=1), make(base, seed=2)
    both = a.add(b)
    expected = a.changes["b.weight"].dense() + b.changes["b.weight"].dense()
    assert torch.equal(both.changes["b.weight"].dense(), expected)
    assert both.shifts["O"] == pytest.approx(2 / 3)
    back = both.add(b, sign=-1)
    difference = back.changes["b.weight"].dense() - a.changes["b.weight"].dense()
    assert difference.abs().max() < 1e-15
    half = a.scale(0.5)
    assert torch.equal(
        half.changes["a.weight"].values, 0.5 * a.changes["a.weight"].values
    )
    assert a.scale(0).updated_parameters == 0
    assert same(base, {**base, **a.add(a, sign=-1).apply(base)})


def test_algebra_needs_one_base_and_one_head():
    one, other = weights(0), weights(9)
    with pytest.raises(PathtuneError, match=r"different bases.*'a\.weight'"):
        make(one).add(make(other))
    with pytest.raises(PathtuneError, match="heads"):
        make(one, head="PBE").add(make(one, head="R2SCAN"))


def test_compare_counts_overlap():
    base = weights()
    a = make(base, seed=1)
    assert compare(a, a)["jaccard"] == 1
    assert compare(a, a)["relative_distance"] == 0
    result = compare(a, make(base, seed=2))
    supports = [
        {
            (n, i)
            for n, c in make(base, seed=s).changes.items()
            for i in c.indices.tolist()
        }
        for s in (1, 2)
    ]
    common, union = supports[0] & supports[1], supports[0] | supports[1]
    assert result["both"] == len(common)
    assert result["jaccard"] == pytest.approx(len(common) / len(union))


def rewrite(path, **edits):
    """Save a valid file again with some tensors or metadata replaced."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["pathtune"])
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    header |= edits.pop("header", {})
    tensors |= edits
    save_file(tensors, path, metadata={"pathtune": json.dumps(header)})


DAMAGE = {
    "outside": {"a.weight.indices": torch.tensor([0, 40], dtype=torch.int32)},
    "negative": {"a.weight.indices": torch.tensor([-1, 4], dtype=torch.int32)},
    "order": {"a.weight.indices": torch.tensor([4, 4], dtype=torch.int32)},
    "nan": {
        "a.weight.indices": torch.tensor([1, 4], dtype=torch.int32),
        "a.weight.values": torch.tensor([1.0, float("nan")]).double(),
    },
    "version": {"header": {"format_version": 99}},
    "stray": {"x.indices": torch.tensor([1], dtype=torch.int32)},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(tmp_path, kind):
    path = tmp_path / "d.safetensors"
    make(weights()).save(path)
    damage = {"a.weight.values": torch.ones(2).double(), **DAMAGE[kind]}
    rewrite(path, **damage)
    with pytest.raises(PathtuneError, match=r"d\.safetensors"):
        DeltaFile.load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "d.safetensors"
    make(weights()).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PathtuneError, match="truncated or no delta"):
        DeltaFile.load(path)


def test_a_delta_that_breaks_the_weights_is_refused():
    base = weights()
    broken = make(base).scale(1e300)
    with pytest.raises(PathtuneError, match="infinite"):
        broken.scale(1e300).apply(base)


def test_fingerprint_sees_dtype_and_shape():
    x = torch.zeros(4)
    digests = {
        fingerprint({"x": t})["x"]
        for t in (x, x.view(2, 2), x.view(torch.int32), torch.zeros(4) + 1)
    }
    assert len(digests) == 4
    assert np.unique([len(d) for d in digests]).tolist() == [64]
