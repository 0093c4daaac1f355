"""The contract of every registered method, with every kind of selection."""

from __future__ import annotations

import os
import signal

import ase.build
import ase.io
import pytest

from pathtune import api, discovery
from pathtune import delta as deltas
from pathtune.config import RunConfig
from pathtune.methods import full
from pathtune.paths import alive_entries
from pathtune.properties import Structure
from pathtune.testing import check_method, symmetry_errors
from pathtune.training import loop
from pathtune.training.interrupt import Interrupted
from tests.backends.families import FAMILIES
from tests.conftest import molecules

METHODS = discovery.names("methods")
SELECTIONS = [None, "all", "linear", "fctp", "readout", "layer=1", "l=1"]


def methanol() -> Structure:
    atoms = ase.build.molecule("CH3OH")
    atoms.rattle(0.05, seed=0)
    return Structure(atoms)


@pytest.fixture(scope="module")
def tiny(tiny_sevennet):
    """Load the tiny SevenNet, which has fctp layers and absent elements, in float64."""
    return api.load(
        str(tiny_sevennet), device="cpu", dtype="float64", trust_checkpoint=True
    )


@pytest.mark.sevennet
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_contract_and_symmetry(method, selection, tiny):
    merged = check_method(tiny, method, methanol(), selection=selection)
    for name, (energy, forces) in symmetry_errors(tiny, methanol(), merged).items():
        assert energy < 1e-8, name
        assert forces < 1e-7, name


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=getattr(pytest.mark, n)) for n in FAMILIES],
)
def pretrained(request):
    """Load a pre-trained model of each family in the vendor's precision."""
    model = FAMILIES[request.param].model
    return api.load(model, device="cpu", dtype="float32", trust_checkpoint=True)


@pytest.mark.parametrize("method", METHODS)
def test_contract_on_every_family(method, pretrained):
    oxide = ase.build.bulk("NiO", "rocksalt", a=4.2)
    oxide.rattle(0.05, seed=0)
    check_method(pretrained, method, Structure(oxide))


@pytest.mark.sevennet
def test_a_wrong_declaration_is_noticed(tiny, monkeypatch):
    monkeypatch.setattr(full.Change, "is_zero_at_start", False)
    with pytest.raises(AssertionError, match="not as declared"):
        check_method(tiny, "full", methanol())


@pytest.mark.sevennet
def test_an_entry_that_moves_though_it_may_not_is_noticed(tiny, monkeypatch):
    def with_absent_elements(weights, selection, _elements, *rest):
        return alive_entries(weights, selection, tiny.elements, *rest)

    monkeypatch.setattr(deltas, "alive_entries", with_absent_elements)
    with pytest.raises(AssertionError, match="cannot be trained moved"):
        check_method(tiny, "sparse", methanol())


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function: press Ctrl-C while the step of this number is computed."""
    step = loop.training_step

    def at(number: int) -> None:
        count = 0

        def training_step(*args, **options):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*args, **options)

        monkeypatch.setattr(loop, "training_step", training_step)

    return at


@pytest.mark.sevennet
@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_a_resumed_run_is_the_same_run(method, trusted_tiny, tmp_path, interrupt):
    """Stopped once in each phase, where the method has two; 3 of 6 and 5 of 6 steps."""
    for seed, part in enumerate(("train", "valid")):
        ase.io.write(tmp_path / f"{part}.xyz", molecules(4, seed))
    fields = discovery.load("methods", method).Config.model_fields
    bound = {"max_updated_percent": 10.0} if "max_updated_percent" in fields else {}

    def run(name: str, *, resume: bool = False) -> bytes:
        config = RunConfig(
            model=trusted_tiny,
            train=str(tmp_path / "train.xyz"),
            valid=str(tmp_path / "valid.xyz"),
            output=str(tmp_path / name),
            method=method,
            method_options=bound,
            max_steps=6,
            eval_every=2,
            device="cpu",
        )
        api.finetune(config, resume=resume)
        return (tmp_path / name / "delta.safetensors").read_bytes()

    whole = run("whole")
    for resume, steps in ((False, 3), (True, 2)):
        interrupt(steps)
        with pytest.raises(Interrupted):
            run("parts", resume=resume)
    assert run("parts", resume=True) == whole
