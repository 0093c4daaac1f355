"""Replay and the retention of a run, through the command line."""

from __future__ import annotations

import json
import signal

import ase.io
import numpy as np
import pytest
import torch
from rich.console import Console

from pathtune import api, replay, retention, robustness
from pathtune.config import RunConfig
from pathtune.plan import prepare
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.structures import survey
from pathtune.training.data import Batch
from pathtune.training.loop import backward
from tests.conftest import crystals, molecules
from tests.e2e.conftest import run_process
from tests.e2e.test_distributed import close, torchrun

pytestmark = pytest.mark.sevennet

QUIET = Console(quiet=True)


@pytest.fixture
def config(finished, trusted_tiny):
    """Return the settings of the finished run, with others."""

    def make(**settings) -> RunConfig:
        given = {"model": trusted_tiny, "train": finished.train}
        return RunConfig(**given, valid=finished.valid, device="cpu", **settings)

    return make


def results(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_labels_are_the_bases_own_whatever_the_reference_energies(config):
    """An unchanged model has nothing to learn from them."""
    plan = prepare(config(replay=12, method="full", dtype="float64"), QUIET)
    assert min(abs(v) for v in plan.references.shifts.values()) > 1
    frames, properties = plan.replay
    assert len(frames) == 12 and set(properties) == {"energy", "forces", "stress"}
    predicted = predict(plan.backend, frames.structures)
    for s, p in zip(frames.structures, predicted, strict=True):
        assert set(s.labels) == set(properties)
        for name, label in s.labels.items():
            np.testing.assert_allclose(label, p[name], atol=1e-12)
    parameters = list(plan.delta.parameters())
    rows = list(range(12))
    batch = Batch(plan.replay, rows, [frames.part(rows)])
    assert float(backward(plan.delta, parameters, batch, plan.config)) < 1e-20
    shifted = frames.with_shifts(plan.references.shifts)
    wrong = Batch(plan.replay._replace(frames=shifted), rows, [shifted.part(rows)])
    assert float(backward(plan.delta, parameters, wrong, plan.config)) > 1e-3


def test_the_weight_multiplies_the_loss(config):
    losses = []
    for weight in (1.0, 4.0):
        settings = config(replay=5, replay_weight=weight, dtype="float64")
        plan = prepare(settings, QUIET)  # sparse: noise at the start
        rows = [0, 1, 2, 3, 4]
        batch = Batch(plan.replay, rows, [plan.replay.frames.part(rows)])
        losses.append(
            float(backward(plan.delta, list(plan.delta.parameters()), batch, settings))
        )
    assert losses[1] == pytest.approx(4 * losses[0], rel=1e-9)


def test_replay_is_no_training_data(config):
    """Alive entries, reference energies and defaults are those without it."""
    without, with_it = (prepare(config(**s), QUIET) for s in ({}, {"replay": 20}))
    replayed = with_it.replay.frames
    assert (
        "Cu" in replayed.survey.elements and "Cu" not in with_it.train.survey.elements
    )
    assert with_it.delta.alive == without.delta.alive
    for a, b in zip(with_it.delta.targets, without.delta.targets, strict=True):
        assert (a.indices == b.indices).all()
    assert with_it.references.shifts == without.references.shifts
    assert with_it.config.batch_size == without.config.batch_size
    assert with_it.zero_shot == without.zero_shot
    assert with_it.identity != without.identity


def test_no_replayed_structure_is_in_the_retention_set(config, trusted_tiny):
    backend = api.load(trusted_tiny)
    drawn = replay.draw(config(replay=50), backend)
    asked = retention.prototypes(backend.elements, retention.SIZES["fast"])
    assert not any(s.atoms == atoms for s in drawn for atoms in asked)
    assert all(
        a.atoms == b.atoms
        for a, b in zip(drawn, replay.draw(config(replay=50), backend), strict=True)
    )


def test_unreasonable_structures_are_left_out(config, trusted_tiny, monkeypatch):
    backend = api.load(trusted_tiny, device="cpu")
    settings = config(replay=12)
    drawn = replay.draw(settings, backend)
    forces = [np.linalg.norm(p["forces"], axis=1) for p in predict(backend, drawn)]
    largest = sorted(f.max() for f in forces)
    monkeypatch.setattr(retention, "LARGEST_FORCE", (largest[8] + largest[9]) / 2)
    assert len(replay.label(drawn, settings, backend, QUIET).frames) == 9


def test_a_file_in_place_of_crystals(config, cli, finished, tmp_path):
    file = tmp_path / "kept.xyz"
    ase.io.write(file, crystals(6))
    whole = prepare(config(replay_file=str(file)), QUIET).replay.frames
    assert len(whole) == 6
    # The file's own labels are not those of the base, and are not used.
    assert (
        abs(whole.structures[0].labels["energy"] - crystals(1)[0].info["REF_energy"])
        > 1
    )
    some = prepare(config(replay_file=str(file), replay=4), QUIET).replay.frames
    assert len({s.source for s in some.structures}) == 4
    ase.io.write(file, ase.Atoms("Au2", [[0, 0, 0], [0, 0, 2.6]]))
    line = ["finetune", *finished.flags, "--trust-checkpoint", "--max-steps", 2]
    line += ["--replay-file", file, "--output", tmp_path / "run"]
    refused = cli(*line)
    assert refused.code == 1 and "does not know Au" in refused.error


def test_replay_keeps_the_model_closer_to_the_base(
    finished, trusted_tiny, cli, tmp_path
):
    drifts = []
    for flags in ([], ["--replay", 40]):
        output = tmp_path / f"run{len(flags)}"
        line = ["finetune", *finished.flags, "--method", "full", "--max-steps", 60]
        line += ["--lr", 0.01, "--batch-size", 6]
        done = cli(*line, *flags, "--output", output)
        assert done.code == 0, done.err
        assert ("labelled by the base" in done.err) == bool(flags)
        assert "energy_drift_mev_per_atom" in done.out
        drifts.append(results(output)["retention"])
    without, with_it = drifts
    for key in ("energy_drift_mev_per_atom", "forces_drift_mev_per_angstrom"):
        assert with_it[key] < 0.7 * without[key]


def test_an_interrupted_run_goes_on_and_refuses_another_file(
    finished, trusted_tiny, cli, tmp_path
):
    file = tmp_path / "kept.xyz"
    ase.io.write(file, crystals(5))
    whole, output = tmp_path / "whole", tmp_path / "run"
    line = ["finetune", *finished.flags, "--replay-file", file, "--batch-size", 3]
    line += ["--max-steps", 7, "--eval-every", 2]
    assert cli(*line, "--output", whole).code == 0
    before = """
import os, signal
from pathtune.training import loop
step, count = loop.training_step, 0
def training_step(*args, **options):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **options)
loop.training_step = training_step
"""
    stopped = run_process(*line, "--output", output, before=before)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    ase.io.write(file, crystals(5, seed=1))
    refused = cli("finetune", "--resume", "--output", output)
    assert refused.code == 1 and "other data" in refused.error
    ase.io.write(file, crystals(5))
    # What is measured at the end is free to change.
    done = cli("finetune", "--resume", "--output", output, "--retention", "none")
    assert done.code == 0, done.err
    a, b = ((f / "delta.safetensors").read_bytes() for f in (whole, output))
    assert a == b
    assert results(output)["retention"] is None


def test_two_processes_are_one(finished, trusted_tiny, cli, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    line = ["finetune", *finished.flags, "--batch-size", 5, "--replay", 7]
    line += ["--max-steps", 6, "--eval-every", 2]
    assert cli(*line, "--output", one).code == 0
    done = torchrun(2, *line, "--output", two, "--json")
    assert done.returncode == 0, done.stderr
    close(one, two, 1e-6)
    # Both processes know the retention; the first one measured it.
    assert json.loads(done.stdout)["retention"]["n_structures"] == 40


def test_nonsense_is_refused(finished, trusted_tiny, cli, tmp_path):
    line = ["finetune", *finished.flags, "--output", tmp_path / "run", "--replay"]
    assert "'replay' = 0" in cli(*line, 0).error
    weights = [f"--set={name}_weight=0" for name in ("energy", "forces", "stress")]
    assert cli(*line, 3, *weights).code != 0
    assert "'retention' = 'huge'" in cli(*line, 3, "--retention", "huge").error


def test_a_corrupted_model_has_drifted_more(trusted_tiny):
    backend = api.load(trusted_tiny, device="cpu")
    stored = backend.stored_weights()
    frames = [Structure(atoms) for atoms in molecules(3)]
    found = []
    for noise in (0.0, 0.02, 0.2):
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: w + noise * torch.randn(w.shape, generator=generator, dtype=w.dtype)
            for name, w in stored.items()
        }
        found.append(
            robustness.measure(
                backend,
                weights,
                size="fast",
                train=survey(frames),
                held_out=frames,
                sizes=survey(frames).n_atoms,
            )
        )
    assert found[0]["dimers"]["new_holes"] == []
    for key in ("energy_drift_mev_per_atom", "forces_drift_mev_per_angstrom"):
        same, some, more = (result[key] for result in found)
        assert same == 0 < 2 * some < more
    dimers = [result["dimers"] for result in found]
    assert {d["n_pairs"] for d in dimers} == {6}
    assert len({d["base_hole_fraction"] for d in dimers}) == 1
    assert dimers[0]["hole_fraction"] == dimers[0]["base_hole_fraction"]
    assert found[0]["nve"]["n_atoms"] == 6 and found[0]["nve"]["time_step_fs"] == 0.5
