"""The contract of every registered method, on a small model with absent elements."""

from __future__ import annotations

import ase.build
import pytest

from pathtune import api, discovery
from pathtune.methods import full
from pathtune.properties import Structure
from pathtune.testing import check_method

pytestmark = pytest.mark.sevennet


def methanol() -> Structure:
    return Structure(ase.build.molecule("CH3OH"))


@pytest.mark.parametrize("method", discovery.names("methods"))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_contract(method, dtype, trusted_tiny):
    check_method(api.load(trusted_tiny, device="cpu", dtype=dtype), method, methanol())


def test_a_wrong_declaration_is_noticed(trusted_tiny, monkeypatch):
    monkeypatch.setattr(full.Change, "is_zero_at_start", False)
    backend = api.load(trusted_tiny, device="cpu", dtype="float64")
    with pytest.raises(AssertionError, match="not as declared"):
        check_method(backend, "full", methanol())
