"""Fine-tuning and everything done with a delta afterwards, through the command line."""

from __future__ import annotations

import json
import os

import ase
import ase.io
import numpy as np
import pytest
import safetensors
import torch
import yaml
from ase.build import molecule
from safetensors.torch import load_file

from pathtune import api
from pathtune.deltafile import DeltaFile
from pathtune.plan import lone_atoms
from tests.conftest import crystals, molecules
from tests.e2e.conftest import message_of, run_process, tree

pytestmark = pytest.mark.sevennet

FILES = {
    "README.md",
    "checkpoints",
    "checkpoints/last.pt",
    "config.yaml",
    "delta.safetensors",
    "environment.json",
    "explain",
    "metrics.json",
    "metrics.jsonl",
    "predictions",
    "report.html",
    "predictions/test.xyz",
    "predictions/test_zero_shot.xyz",
    "predictions/valid.xyz",
    "predictions/valid_zero_shot.xyz",
    "short_range.json",
}
ERRORS = {
    "n_structures",
    "energy_mae_mev_per_atom",
    "energy_rmse_mev_per_atom",
    "forces_mae_mev_per_angstrom",
    "forces_rmse_mev_per_angstrom",
}
SPARSITY = {
    "total_sparsity",
    "active_sparsity",
    "updated_parameters",
    "total_parameters",
}
TIMING = {"seconds_per_step", "seconds_total", "peak_memory_mib"}


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results(folder):
    return json.loads((folder / "metrics.json").read_text())


def write(path, frames):
    ase.io.write(path, frames)
    return path


@pytest.fixture
def tune(cli, trusted_tiny, tmp_path):
    """Run `finetune` on the tiny model in this process; return folder and outcome."""

    def run(train, *flags, name="run", steps=4):
        line = ["finetune", "--model", trusted_tiny, "--train", train]
        line += ["--output", tmp_path / name]
        if steps:
            line += ["--max-steps", steps]
        outcome = cli(*line, *flags)
        assert outcome.code == 0, outcome.err
        return tmp_path / name, outcome

    return run


def test_a_run_writes_its_files_and_prints_one_json_object(
    trusted_tiny, molecule_files, tmp_path
):
    folder = tmp_path / "run"
    outcome = run_process(
        *["finetune", "--model", trusted_tiny, "--output", folder, "--json"],
        *[
            part
            for name, file in molecule_files.items()
            for part in (f"--{name}", file)
        ],
        *["--max-steps", 12, "--eval-every", 4, "--preset", "high"],
    )
    assert outcome.code == 0, outcome.err
    written = set(tree(folder))
    assert "explain/explain.json" in written
    assert {name for name in written if not name.startswith("explain/")} == FILES
    printed = json.loads(outcome.out)
    assert printed == results(folder)

    assert {"zero_shot", "zero_shot_raw", "valid", "test"} <= set(printed)
    for part in ("zero_shot", "zero_shot_raw", "valid", "test"):
        assert set(printed[part]) == ERRORS
    assert printed["zero_shot"]["n_structures"] == 3
    assert set(printed["sparsity"]) >= SPARSITY
    assert printed["sparsity"]["total_parameters"] == 2134
    assert set(printed["timing"]) == TIMING
    assert all(value > 0 for value in printed["timing"].values())

    assert [r["step"] for r in records(folder)] == [0, 4, 8, 12]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["method_options"]["tau_weight_decay"] == 0.3
    assert config["batch_size"] == 1
    machine = json.loads((folder / "environment.json").read_text())
    assert machine["versions"]["sevenn"]
    raw = printed["zero_shot_raw"]["energy_mae_mev_per_atom"]
    assert raw > printed["zero_shot"]["energy_mae_mev_per_atom"]


def test_the_loss_falls(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(6))
    flags = ["--eval-every", 20, "--method", "full", "--lr", 0.01]
    folder, _ = tune(train, *flags, steps=60)
    rows = records(folder)
    assert [r["step"] for r in rows] == [0, 20, 40, 60]
    assert rows[-1]["train_loss"] < 0.9 * rows[1]["train_loss"]
    assert rows[-1]["valid_loss"] < rows[0]["valid_loss"]
    result = results(folder)
    assert result["best_step"] > 0
    best = next(r for r in rows if r["step"] == result["best_step"])
    forces = "forces_mae_mev_per_angstrom"
    assert result["valid"][forces] == pytest.approx(best["valid"][forces], rel=1e-3)


def test_the_config_is_a_fixed_point_and_equal_runs_write_equal_bytes(
    finished, tmp_path, trusted_tiny, cli
):
    copy = tmp_path / "again"
    config = finished.folder / "config.yaml"
    assert cli("finetune", config, "--output", copy).code == 0
    assert (copy / "delta.safetensors").read_bytes() == finished.delta.read_bytes()
    settings = [yaml.safe_load(f.read_text()) for f in (copy / "config.yaml", config)]
    assert settings[0] | {"output": None} == settings[1] | {"output": None}


def test_another_seed_gives_another_delta(finished, tune):
    folder, _ = tune(finished.train, "--valid", finished.valid, "--seed", 1, steps=6)
    assert (folder / "delta.safetensors").read_bytes() != finished.delta.read_bytes()


def test_a_dry_run_writes_nothing(finished, trusted_tiny, cli, tmp_path):
    before = tree(tmp_path)
    line = ["finetune", *finished.flags, "--output", tmp_path / "run", "--dry-run"]
    outcome = cli(*line, "--json")
    assert outcome.code == 0
    plan = json.loads(outcome.out)
    assert plan["total_parameters"] == 2134
    assert plan["seconds_per_step"] > 0
    assert set(plan["reference_energies"]["shifts"]) == {"H", "C", "O"}
    assert tree(tmp_path) == before


def test_validation_frames_are_set_aside_and_named(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(20))
    folder, outcome = tune(train)
    line = next(x for x in outcome.err.splitlines() if x.startswith("validation:"))
    assert "2 of the training frames set aside, indices" in line
    chosen = [int(i) for i in line.partition("indices ")[2].split(",")]
    assert len(set(chosen)) == 2
    assert set(chosen) <= set(range(20))
    assert results(folder)["valid"]["n_structures"] == 2
    assert "18 train, 2 valid frames" in message_of(outcome.err)


def test_validating_on_training_frames_is_warned_about(finished, tune):
    _, outcome = tune(finished.train, "--valid", finished.train, steps=1)
    assert "warning: valid frames: 6 frames" in outcome.err


# What is labelled


@pytest.mark.parametrize("missing", ["energy", "forces"])
def test_one_kind_of_label_is_enough(missing, tune, tmp_path):
    frames = molecules(6)
    for atoms in frames:
        if missing == "energy":
            del atoms.info["REF_energy"]
        else:
            del atoms.arrays["REF_forces"]
    folder, _ = tune(write(tmp_path / "train.xyz", frames))
    result = results(folder)
    assert not any(key.startswith(missing) for key in result["valid"])
    assert len(result["valid"]) == 3
    assert result["sparsity"]["updated_parameters"] > 0


def test_stress_is_trained_on(tune, tmp_path):
    train = write(tmp_path / "train.xyz", crystals(6))
    folder, _ = tune(train, "--set", "method_options.init_std=0.001")
    result = results(folder)
    assert result["valid"]["stress_mae_mev_per_angstrom3"] > 0
    blind, _ = tune(
        train,
        *["--set", "method_options.init_std=0.001", "--set", "stress_weight=0"],
        name="blind",
    )
    deltas = [load_file(f / "delta.safetensors") for f in (folder, blind)]
    assert any(
        deltas[0][n].shape != deltas[1][n].shape or (deltas[0][n] != deltas[1][n]).any()
        for n in deltas[0].keys() & deltas[1].keys()
    )


def test_a_frame_of_weight_zero_teaches_nothing(tune, tmp_path):
    valid = write(tmp_path / "valid.xyz", molecules(2, seed=1))
    deltas = []
    for name, weight, factor in (("a", 0, 1), ("b", 0, -3), ("c", 1, -3)):
        frames = molecules(5)
        frames[2].info["config_weight"] = weight
        frames[2].arrays["REF_forces"] *= factor
        train = write(tmp_path / f"{name}.xyz", frames)
        folder, _ = tune(train, "--valid", valid, name=name, steps=6)
        deltas.append(DeltaFile.load(folder / "delta.safetensors").changes)
    a, b, c = deltas
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].dense(), b[n].dense()) for n in a)
    assert any(not torch.equal(b[n].dense(), c[n].dense()) for n in b)


# How long


def test_epochs(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(5))
    valid = write(tmp_path / "valid.xyz", molecules(2, seed=1))
    flags = ["--max-epochs", 3, "--batch-size", 2, "--valid", valid]
    folder, _ = tune(train, *flags, steps=None)
    assert results(folder)["steps"] == 8  # 15 frames in batches of 2
    assert records(folder)[-1]["epoch"] == pytest.approx(3.2)


def test_the_same_command_line_resumes(tune, tmp_path):
    """A queue script gives the full command each time, values that resolve included."""
    train = write(tmp_path / "train.xyz", molecules(5))
    flags = ["--max-epochs", 2, "--batch-size", 100, "--device", "auto"]
    flags += ["--set", "method_options.tau_per=path", "--eval-every", 1]
    folder, _ = tune(train, *flags, steps=None)
    delta = (folder / "delta.safetensors").read_bytes()
    config = (folder / "config.yaml").read_bytes()
    for name in ("delta.safetensors", "metrics.json"):
        (folder / name).unlink()
    tune(train, *flags, "--resume", steps=None)
    assert (folder / "delta.safetensors").read_bytes() == delta
    assert (folder / "config.yaml").read_bytes() == config


def test_the_same_yaml_resumes_and_unknown_keys_are_refused(
    tune, cli, trusted_tiny, tmp_path
):
    train = write(tmp_path / "train.xyz", molecules(5))
    settings = tmp_path / "run.yaml"
    settings.write_text("lr: 1e-2\nmax_steps: 3\n")  # YAML 1.1 reads a string
    folder, _ = tune(train, settings, steps=None)
    (folder / "metrics.json").unlink()
    tune(train, settings, "--resume", steps=None)
    line = ["finetune", "--resume", "--output", folder, "--set", "max_step=5"]
    outcome = cli(*line)
    assert outcome.code == 2
    assert "Did you mean 'max_steps'" in message_of(outcome.err)


@pytest.mark.parametrize("key", ["config_weight", "config_forces_weight"])
def test_changed_weights_do_not_resume(key, tune, cli, trusted_tiny, tmp_path):
    frames = molecules(5)
    train = write(tmp_path / "train.xyz", frames)
    folder, _ = tune(train)
    (folder / "metrics.json").unlink()
    frames[0].info[key] = 3.0
    write(train, frames)
    outcome = cli("finetune", "--resume", "--output", folder)
    assert outcome.code == 1
    assert "other settings" in message_of(outcome.err)


@pytest.mark.parametrize("seed", range(4))
def test_isolated_atoms_give_the_reference_energies(seed, tune, tmp_path):
    """They stay in the training part whatever the seed of the split."""
    lone = []
    for symbol, energy in (("H", -10.0), ("C", -20.0), ("O", -30.0)):
        atom = ase.Atoms(symbol)
        atom.info |= {"REF_energy": energy, "config_type": "IsolatedAtom"}
        atom.arrays["REF_forces"] = np.zeros((1, 3))
        lone.append(atom)
    train = write(tmp_path / "train.xyz", [*lone, *molecules(3)])
    flags = ["--reference-energies", "isolated", "--seed", seed]
    folder, _ = tune(train, *flags, steps=1)
    shifts = DeltaFile.load(folder / "delta.safetensors").shifts
    model = api.load(yaml.safe_load((folder / "config.yaml").read_text())["model"])
    base = lone_atoms(model, ["H", "C", "O"])
    for symbol, energy in (("H", -10.0), ("C", -20.0), ("O", -30.0)):
        assert base[symbol] + shifts[symbol] == pytest.approx(energy, abs=1e-5)


def test_a_reference_energy_file(tune, tmp_path):
    path = tmp_path / "e0.json"
    path.write_text(json.dumps({"H": -10.0, "C": -20.0, "O": -30.0, "N": -25.0}))
    train = write(tmp_path / "train.xyz", molecules(4))
    folder, _ = tune(train, "--reference-energies", path, steps=1)
    found = results(folder)
    assert found["zero_shot"] != found["zero_shot_raw"], "re-estimated for fairness"
    assert set(DeltaFile.load(folder / "delta.safetensors").shifts) == {"H", "C", "O"}


def test_files_with_different_keys_are_warned_about(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(4))
    others = molecules(2, seed=3)
    for atoms in others:
        atoms.info["energy"] = atoms.info.pop("REF_energy")
    valid = write(tmp_path / "valid.xyz", others)
    _, outcome = tune(train, "--valid", valid, steps=1)
    assert "energy is 'REF_energy' in the training frames" in message_of(outcome.err)
    assert "keys REF_energy, REF_forces" in message_of(outcome.err)


def test_elements_without_a_shift_are_named(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(4))
    ethane = molecule("CH3OH")
    ethane.numbers[0] = 29
    ethane.info["REF_energy"] = -1.0
    test = write(tmp_path / "test.xyz", ethane)
    _, outcome = tune(train, "--test", test, steps=1)
    assert "no training frame has Cu" in message_of(outcome.err)


def test_a_bound_from_the_command_line(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(4))
    folder, outcome = tune(train, "--max-updated-percent", 5, steps=10)
    assert "method: gradual" in message_of(outcome.err)
    counts = results(folder)["sparsity"]
    assert 0 < counts["updated_parameters"] <= 0.05 * counts["total_parameters"]
    assert counts["updated_parameters"] > 0.04 * counts["total_parameters"]


def test_a_bound_given_again_resumes_what_was_begun(tune, cli, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(4))
    bound = ["--max-updated-percent", 5]
    folder, _ = tune(train, "--preset", "high", *bound, steps=4)
    outcome = cli("finetune", "--resume", "--output", folder, *bound)
    assert outcome.code == 0, outcome.err
    assert "nothing to do" in message_of(outcome.err)


def test_predictions_do_not_overwrite_unasked(finished, trusted_tiny, cli, tmp_path):
    data = write(tmp_path / "data.xyz", molecules(2))
    line = ["evaluate", data, "--model", trusted_tiny, "--output", data]
    before = data.read_bytes()
    assert cli(*line).code == 2
    assert data.read_bytes() == before
    assert cli(*line, "--overwrite").code == 0


def test_changed_epochs_do_not_resume(tune, cli, trusted_tiny, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(5))
    folder, _ = tune(train, "--max-epochs", 2, steps=None)
    (folder / "metrics.json").unlink()
    line = ["finetune", "--resume", "--output", folder, "--max-epochs", 3]
    outcome = cli(*line)
    assert outcome.code == 1
    assert "other settings" in message_of(outcome.err)


def test_patience_stops_early(tune, tmp_path):
    train = write(tmp_path / "train.xyz", molecules(4))
    # Labels with the opposite sign: what helps the training frames hurts here.
    frames = molecules(2, seed=1)
    for atoms in frames:
        atoms.arrays["REF_forces"] *= -1
        del atoms.info["REF_energy"]
    valid = write(tmp_path / "valid.xyz", frames)
    flags = ["--valid", valid, "--eval-every", 5, "--patience", 2, "--lr", 0.01]
    folder, _ = tune(train, *flags, "--method", "full", steps=200)
    result = results(folder)
    assert result["steps"] < 200
    assert len(records(folder)) - 1 - result["best_step"] // 5 in (2, 3)


# check


def test_check_says_ok_in_json_and_in_its_exit_code(finished, trusted_tiny, cli):
    outcome = cli("check", finished.train, "--model", trusted_tiny, "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 0
    assert report["ok"] is True
    assert report["counts"]["energy"] == 6
    assert report["elements"] == ["H", "C", "O"]


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_check_fails_on_a_leak(json_flag, finished, cli):
    line = ["check", finished.train, "--against", finished.train, *json_flag]
    outcome = cli(*line)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    if json_flag:
        report = json.loads(outcome.out)
        assert report["ok"] is False
        assert "leakage" in {f["code"] for f in report["findings"]}
    else:
        assert outcome.out.rstrip().endswith("not ok")


def test_check_reports_frames_no_model_can_compute(trusted_tiny, tmp_path, cli):
    frames = molecules(2)
    frames[0].pbc = True
    frames[1].numbers[0] = 26
    data = write(tmp_path / "bad.xyz", frames)
    outcome = cli("check", data, "--model", trusted_tiny, "--json")
    assert outcome.code == 1
    codes = {f["code"] for f in json.loads(outcome.out)["findings"]}
    assert {"degenerate-cell", "unknown-elements"} <= codes


# evaluate, merge, inspect


def test_evaluating_again_gives_the_numbers_of_the_run(
    finished, trusted_tiny, tmp_path, cli
):
    output = tmp_path / "predictions.xyz"
    line = ["evaluate", finished.test, "--model", trusted_tiny]
    outcome = cli(*line, "--delta", finished.delta, "--output", output, "--json")
    assert outcome.code == 0
    again, expected = json.loads(outcome.out), results(finished.folder)["test"]
    assert again.keys() == expected.keys()
    assert again == pytest.approx(expected, rel=1e-6)

    frames = ase.io.read(output, ":")
    errors = []
    for atoms in frames:
        assert atoms.get_potential_energy() == atoms.info["pathtune_energy"]
        assert np.array_equal(atoms.get_forces(), atoms.arrays["pathtune_forces"])
        errors.append(np.abs(atoms.get_forces() - atoms.arrays["REF_forces"]).ravel())
    mae = 1e3 * float(np.mean(np.concatenate(errors)))
    assert mae == pytest.approx(expected["forces_mae_mev_per_angstrom"], rel=1e-5)

    base = json.loads(cli(*line, "--json").out)
    raw = results(finished.folder)["zero_shot_raw"]
    assert base == pytest.approx(raw, rel=1e-6)


def test_evaluating_without_labels(trusted_tiny, tmp_path, cli):
    data = write(tmp_path / "plain.xyz", [molecule("CH3OH")])
    outcome = cli("evaluate", data, "--model", trusted_tiny, "--json")
    assert json.loads(outcome.out) == {"n_structures": 1}


def test_merged_file_predicts_like_base_and_delta(
    finished, trusted_tiny, tmp_path, cli
):
    merged = tmp_path / "merged.pth"
    line = ["merge", "--model", trusted_tiny, "--delta", finished.delta]
    outcome = cli(*line, "--output", merged, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["energy_max_difference_ev_per_atom"] < 1e-5
    # What merge writes is trusted without the flag.
    outcome = cli("evaluate", finished.test, "--model", merged, "--json")
    assert outcome.code == 0
    expected = results(finished.folder)["test"]
    assert json.loads(outcome.out) == pytest.approx(expected, rel=1e-3)
    first = merged.read_bytes()
    assert cli(*line, "--output", merged, "--overwrite").code == 0
    assert merged.read_bytes() == first


def test_inspect(finished, cli):
    outcome = cli("inspect", finished.delta, "--json")
    assert outcome.code == 0
    content = json.loads(outcome.out)
    sparsity = results(finished.folder)["sparsity"]
    assert content["updated_parameters"] == sparsity["updated_parameters"]
    assert (
        sum(row["updated"] for row in content["tensors"])
        == (content["updated_parameters"])
    )
    assert set(content["shifts"]) == {"C", "H", "O"}
    assert content["model"] == "tiny.pth"
    assert cli("inspect", finished.delta).code == 0


def test_the_delta_file_says_nothing_of_time_host_or_path(finished, tmp_path):
    with safetensors.safe_open(finished.delta, "pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"pathtune"}
    text = metadata["pathtune"]
    assert json.dumps(json.loads(text), sort_keys=True) == text
    assert str(finished.folder.parent) not in text
    assert os.uname().nodename not in text


# Algebra


def _dense(path):
    loaded = DeltaFile.load(path)
    return {n: c.dense() for n, c in loaded.changes.items()}, loaded.shifts


def test_add_then_subtract_gives_the_first_back(finished, tune, tmp_path, cli):
    folder, _ = tune(finished.train, "--valid", finished.valid, "--seed", 1)
    first, second = finished.delta, folder / "delta.safetensors"
    total, back = tmp_path / "sum.safetensors", tmp_path / "back.safetensors"
    assert cli("delta", "add", first, second, "--output", total).code == 0
    assert cli("delta", "subtract", total, second, "--output", back).code == 0
    (a, shifts_a), (b, shifts_b) = _dense(first), _dense(back)
    for name in a | b:
        expected, found = (d.get(name, torch.zeros(())) for d in (a, b))
        assert torch.allclose(expected, found, rtol=0, atol=1e-12)
    assert shifts_b == pytest.approx(shifts_a, abs=1e-9)


def test_scaled_by_zero_it_changes_nothing(finished, trusted_tiny, tmp_path, cli):
    zero = tmp_path / "zero.safetensors"
    assert cli("delta", "scale", finished.delta, "0", "--output", zero).code == 0
    content = json.loads(cli("inspect", zero, "--json").out)
    assert content["updated_parameters"] == 0
    assert not any(content["shifts"].values())
    line = ["evaluate", finished.test, "--model", trusted_tiny, "--json"]
    assert cli(*line, "--delta", zero).out == cli(*line).out


def test_difference_of_a_delta_and_itself(finished, cli):
    outcome = cli("delta", "diff", finished.delta, finished.delta, "--json")
    assert outcome.code == 0
    content = json.loads(outcome.out)
    assert content["jaccard"] == 1.0
    assert content["relative_distance"] == 0.0
    assert content["only_a"] == content["only_b"] == 0
    assert "1.000" in cli("delta", "diff", finished.delta, finished.delta).out


def test_models(cli):
    content = json.loads(cli("models", "--json").out)
    assert {"backend", "name", "available", "reason"} <= set(content[0])
    assert "7net-0" in {model["name"] for model in content}
