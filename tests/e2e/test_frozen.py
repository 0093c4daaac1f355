"""Method frozen on the command line: reference energies alone, without a step."""

from __future__ import annotations

import json

import pytest

from pathtune.deltafile import DeltaFile

pytestmark = pytest.mark.sevennet


@pytest.fixture
def flags(finished, trusted_tiny):
    return ["finetune", *finished.flags, "--test", finished.test, "--method", "frozen"]


def test_it_ends_at_once_with_the_table_and_the_shifts(flags, cli, tmp_path):
    output = tmp_path / "run"
    outcome = cli(*flags, "--output", output)
    assert outcome.code == 0, outcome.err
    assert "test: 2 structures" in outcome.out
    assert "updated 0 of 2134 parameters (0.00 %)" in outcome.out
    assert "training: none" in outcome.err
    assert "0 trainable numbers" in outcome.err
    assert "warning" not in outcome.err
    results = json.loads((output / "metrics.json").read_text())
    assert (results["steps"], results["best_step"]) == (0, 0)
    assert results["test"] == pytest.approx(results["zero_shot"], rel=1e-3)
    assert results["sparsity"]["total_sparsity"] == 1
    assert results["sparsity"]["active_sparsity"] == 1
    raw, tuned = results["zero_shot_raw"], results["test"]
    assert tuned["energy_mae_mev_per_atom"] < raw["energy_mae_mev_per_atom"]
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 0
    delta = DeltaFile.load(output / "delta.safetensors")
    assert not delta.changes
    assert set(delta.shifts) == {"C", "H", "O"}
    again = cli("finetune", "--resume", "--output", output)
    assert again.code == 0
    assert "nothing to do" in " ".join(again.err.split())


def test_its_delta_merges_and_evaluates(flags, cli, tmp_path, finished):
    assert cli(*flags, "--output", tmp_path / "run").code == 0
    pair = ["--model", finished.model, "--delta", tmp_path / "run/delta.safetensors"]
    outcome = cli("merge", *pair, "--output", tmp_path / "merged.pth")
    assert outcome.code == 0, outcome.err
    one = cli("evaluate", finished.test, *pair, "--json")
    other = cli("evaluate", finished.test, "--model", tmp_path / "merged.pth", "--json")
    merged = json.loads(other.out)
    assert merged == pytest.approx(json.loads(one.out), rel=1e-4)


def test_a_dry_run_probes_nothing(flags, cli):
    outcome = cli(*flags, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert (plan["seconds_per_step"], plan["seconds_total"]) == (0, 0)
    assert plan["config"]["lr"] is None


def test_a_learning_rate_is_refused(flags, cli, tmp_path):
    outcome = cli(*flags, "--lr", 0.1, "--output", tmp_path / "run")
    assert outcome.code == 2
    assert "frozen option 'lr'" in outcome.error
    assert not (tmp_path / "run").exists()
