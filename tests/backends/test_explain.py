"""Explanations of every family: two of its checkpoints, and the delta between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pathtune
from pathtune import discovery, trust
from pathtune.deltafile import DeltaFile, exact_change, fingerprint
from pathtune.explain import explain, explain_checkpoints
from tests.backends.families import FAMILIES


@pytest.fixture(
    params=[
        pytest.param(name, marks=getattr(pytest.mark, name))
        for name in discovery.names("backends")
    ],
)
def family(request):
    return FAMILIES[request.param]


def test_a_known_change_is_found_where_it_was_made(family, tmp_path):
    """Entries of one parameter of each kind, through the vendor's own file."""
    base = pathtune.load(family.model, device="cpu", trust_checkpoint=True)
    stored = base.stored_weights()
    shifted = base.elements[:2] if base.has_shift_by_element else ()
    by_kind = {}
    for record in base.path_weights():
        if record.kind != "scale_shift" and record.properties and not record.unused:
            by_kind.setdefault(record.kind, record)
    generator = np.random.default_rng(0)
    changes = {}
    for record in by_kind.values():
        hit = generator.random(record.size) < 0.5
        hit[0] = True
        noise = torch.from_numpy(np.where(hit, 0.01, 0.0)).view(record.shape)
        weight = stored[record.name]
        changes[record.name] = exact_change(weight, (weight + noise).to(weight.dtype))
    metadata = {"base": fingerprint(stored), "head": base.head, "model": "m"}
    delta = DeltaFile(changes, dict.fromkeys(shifted, 0.25), metadata)
    path = tmp_path / f"tuned{family.suffix}"
    base.save(path, delta.apply(stored), delta.shifts)
    trust.remember(path)
    of_files = explain_checkpoints(family.model, str(path), trust_checkpoint=True)
    of_delta = explain(base, delta)
    updated = {
        r["parameter"]: r["updated"]
        for r in of_files.document["tables"]["parameter"]
        if r["updated"]
    }
    assert updated == {name: len(c.indices) for name, c in changes.items()}
    assert of_files.document["totals"]["entries"] == base.total_parameters
    for name in ("norm", "updated", "largest"):
        totals = [e.document["totals"][name] for e in (of_files, of_delta)]
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    found = of_files.document["about"]["shifts"]
    assert found == pytest.approx(dict(delta.shifts), abs=1e-5)
    basis = [r["basis"] for r in of_files.document["tables"]["radial"]]
    assert basis
