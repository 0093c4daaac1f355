"""Accelerated kernels: the vendor's conversion, compared, refused where it differs."""

from __future__ import annotations

import importlib.util
import json

import ase.io
import pytest

import pathtune
from pathtune import acceleration, api
from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import Structure
from tests.backends.families import MODELS
from tests.conftest import crystals

SMALL = str(MODELS / "mace-small.model")


@pytest.fixture
def mace():
    return pathtune.load(SMALL, device="cpu", trust_checkpoint=True)


@pytest.mark.mace
@pytest.mark.skipif(
    importlib.util.find_spec("cuequivariance_torch") is None, reason="needs cueq"
)
@pytest.mark.filterwarnings("ignore")  # the vendor's, while it converts
def test_cuequivariance_gives_the_same_errors(mace, tmp_path):
    frames = [Structure(atoms) for atoms in crystals(2)]
    plain, fast = (
        list(acceleration.predictions(api.calculator(mace, accelerator=name), frames))
        for name in (None, "cueq")
    )
    for a, b in zip(plain, fast, strict=True):
        assert a["energy"] == pytest.approx(b["energy"], abs=1e-5)
        assert a["forces"] == pytest.approx(b["forces"], abs=1e-5)
        assert a["stress"] == pytest.approx(b["stress"], abs=1e-6)
    ase.io.write(tmp_path / "data.xyz", crystals(2))
    errors = [
        api.evaluate(str(tmp_path / "data.xyz"), mace, accelerator=name)
        for name in (None, "cueq")
    ]
    assert json.dumps(errors[0]) != "{}"
    for key, value in errors[0].items():
        assert errors[1][key] == pytest.approx(value, rel=1e-3)


@pytest.mark.mace
def test_a_conversion_that_changes_predictions_is_refused(mace, monkeypatch):
    def corrupted(weights, shifts, name):
        name = "interactions.0.skip_tp.weight"
        return mace.calculator({name: 1.001 * mace.stored_weights()[name]}, shifts)

    monkeypatch.setattr(mace, "accelerated", corrupted)
    monkeypatch.setattr(type(mace), "accelerators", {"cueq": "mace"})
    with pytest.raises(
        PathtuneError, match=r"cueq changes the \w+ by .* go on without"
    ):
        api.calculator(mace, accelerator="cueq")


@pytest.mark.mace
def test_wrong_names_and_missing_packages(mace, monkeypatch):
    with pytest.raises(UsageError, match="Did you mean 'cueq'"):
        api.calculator(mace, accelerator="cuequ")
    monkeypatch.setattr(type(mace), "accelerators", {"cueq": "no_such_package"})
    with pytest.raises(PathtuneError, match="needs no_such_package"):
        api.calculator(mace, accelerator="cueq")


@pytest.mark.sevennet
def test_a_vendor_that_would_go_on_without_is_an_error(trusted_tiny, monkeypatch):
    backend = pathtune.load(trusted_tiny, device="cpu")
    monkeypatch.setattr(type(backend), "accelerators", {"cueq": "sevenn"})
    with pytest.raises(PathtuneError, match="converted to cueq: cuEquivariance is req"):
        api.calculator(backend, accelerator="cueq")


@pytest.mark.chgnet
def test_a_family_without_kernels():
    with pytest.raises(UsageError, match="chgnet has no accelerator"):
        api.calculator("chgnet", accelerator="cueq", device="cpu")
