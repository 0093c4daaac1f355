"""A spin layer through the command line: train, resume, evaluate, merge, calculate."""

from __future__ import annotations

import json
import os
import signal

import ase.build
import ase.io
import numpy as np
import pytest
import yaml
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from rich.console import Console

import pathtune
from pathtune.deltafile import DeltaFile
from pathtune.training import loop

pytestmark = pytest.mark.sevennet

COUPLING, RANGE = 0.05, 1.0  # eV/μ_B^2, Å


def magnets(n: int, seed: int = 0) -> list[ase.Atoms]:
    """Return copper cells of EMT with turning moments and a Heisenberg coupling.

    E = EMT - sum over pairs of J(r) m_i.m_j, J(r) = 0.05 exp(-(r - 2.5 Å)/1 Å) up to
    3.2 Å. Four frames in turn share their positions and differ in their moments.
    """
    frames = []
    for index in range(n):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.rattle(0.06, seed=1000 * seed + index // 4)
        generator = np.random.default_rng((seed, index))
        moments = generator.normal(size=(4, 3))
        moments *= 1.7 / np.linalg.norm(moments, axis=1)[:, None]
        i, j, r, d = neighbor_list("ijdD", atoms, 3.2)
        coupling = COUPLING * np.exp((2.5 - r) / RANGE)
        dots = (moments[i] * moments[j]).sum(1)
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = None
        # Each pair is counted twice, and moves both of its atoms.
        slope = (coupling * dots / RANGE)[:, None] * d / r[:, None]
        np.add.at(forces, i, slope)
        field = np.zeros((4, 3))
        np.add.at(field, i, coupling[:, None] * moments[j])
        atoms.info["REF_energy"] = energy - float((coupling * dots).sum()) / 2
        atoms.arrays["REF_forces"] = forces
        atoms.arrays["REF_magmoms"] = moments
        atoms.arrays["REF_magforces"] = field
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("magnets")
    written = {}
    for seed, (name, n) in enumerate({"train": 24, "valid": 8, "test": 8}.items()):
        written[name] = str(folder / f"{name}.xyz")
        ase.io.write(written[name], magnets(n, seed))
    return written


@pytest.fixture
def flags(files, trusted_tiny) -> list[str]:
    given = ["--model", trusted_tiny, "--device", "cpu"]
    for name, path in files.items():
        given += [f"--{name}", path]
    given += ["--spin", "--set", "spin.width=16", "--set", "spin.lr=0.01"]
    return [*given, "--set", "retention=none"]


@pytest.fixture(scope="module")
def trained(files, tiny_sevennet, tmp_path_factory):
    """Return the folder of a run of 60 steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHTUNE_HOME", str(folder.parent / "home"))
        config = pathtune.RunConfig(
            model=str(tiny_sevennet), **files, output=str(folder), device="cpu",
            spin={"width": 16, "lr": 0.01}, max_steps=60, eval_every=20, batch_size=8,
            retention="fast", trust_checkpoint=True,
        )  # fmt: skip
        pathtune.finetune(config, console=Console(quiet=True))
    return folder


def results(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_labels_of_this_file_are_consistent():
    """Forces and magnetic forces are the derivatives of the energy."""

    def energy(positions, moments):
        changed = frame.copy()
        changed.positions = positions
        i, j, r = neighbor_list("ijd", changed, 3.2)
        dots = (moments[i] * moments[j]).sum(1)
        changed.calc = EMT()
        exchange = (COUPLING * np.exp((2.5 - r) / RANGE) * dots).sum() / 2
        return changed.get_potential_energy() - exchange

    (frame,) = magnets(1)
    positions, moments = frame.positions.copy(), frame.arrays["REF_magmoms"]
    assert energy(positions, moments) == pytest.approx(frame.info["REF_energy"])
    step = 1e-5 * np.eye(12).reshape(12, 4, 3)[5]
    work = energy(positions - step, moments) - energy(positions + step, moments)
    assert work / 2e-5 == pytest.approx(frame.arrays["REF_forces"].flat[5], abs=1e-6)
    work = energy(positions, moments - step) - energy(positions, moments + step)
    assert work / 2e-5 == pytest.approx(frame.arrays["REF_magforces"].flat[5], abs=1e-8)


def test_without_the_layer_orderings_are_alike_and_with_it_they_are_learned(
    trained, files, trusted_tiny, cli
):
    plain = cli("evaluate", files["test"], "--model", trusted_tiny, "--json")
    orderings = json.loads(plain.out)["orderings"]
    assert (orderings["n_groups"], orderings["n_structures"]) == (2, 8)
    assert orderings["spearman"] is None
    for group in orderings["groups"]:
        assert np.ptp(group["predicted"]) == 0
        assert np.ptp(group["labelled"]) > 50
    assert orderings["difference_mae_mev_per_atom"] == pytest.approx(
        orderings["difference_size_mev_per_atom"]
    )
    found = pathtune.evaluate(
        files["test"], trusted_tiny, trained / "delta.safetensors", device="cpu"
    )
    orderings = found["orderings"]
    assert orderings["spearman"] > 0.8
    size = orderings["difference_size_mev_per_atom"]
    assert orderings["difference_mae_mev_per_atom"] < 0.1 * size
    for key, value in results(trained)["test"].items():
        if isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_what_a_run_says_and_counts(trained):
    metrics = results(trained)
    test, zero_shot = metrics["test"], metrics["zero_shot"]
    assert (
        test["magforces_mae_mev_per_mu_b"]
        < 0.2 * zero_shot["magforces_mae_mev_per_mu_b"]
    )
    assert zero_shot["magmom_vector_mae_mu_b"] < 1e-6, "moments are the input"
    assert set(test["by_element"]) == {"Cu"}
    sparsity = metrics["sparsity"]
    delta = DeltaFile.load(trained / "delta.safetensors")
    new = sum(t.numel() for t in delta.layer.values())
    changed = sum(len(c.indices) for c in delta.changes.values())
    total = sparsity["total_parameters"]
    assert sparsity["new_parameters"] == new == total - 2134
    assert sparsity["updated_parameters"] == changed + new
    assert sparsity["total_sparsity"] == pytest.approx(1 - (changed + new) / total)
    active = 1 - changed / sparsity["alive_parameters"]
    assert sparsity["active_sparsity"] == pytest.approx(active)
    assert metrics["spin"]["magforces_scale"] == 1.0
    assert metrics["retention"]["n_structures"] > 30
    config = yaml.safe_load((trained / "config.yaml").read_text())
    weights = [config[f"{name}_weight"] for name in ("energy", "forces", "stress")]
    assert weights == [1, 1, 1]


def test_couplings_are_fitted_before_the_first_step(flags, tmp_path, cli):
    errors = {}
    for fit in ("true", "false"):
        folder = tmp_path / fit
        line = ["--method", "frozen", "--max-steps", 1, "--output", folder, "--json"]
        outcome = cli("finetune", *flags, *line, "--set", f"spin.fit={fit}")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out), "progress is not shown where results are"
        assert ("least squares" in outcome.err) is (fit == "true")
        first = (folder / "metrics.jsonl").read_text().splitlines()[0]
        start = json.loads(first)["valid"]
        errors[fit] = [
            start["magforces_mae_mev_per_mu_b"],
            start["energy_mae_mev_per_atom"],
        ]
    for fitted, unfitted in zip(errors["true"], errors["false"], strict=True):
        assert fitted < 0.1 * unfitted


def test_resume_is_the_uninterrupted_run(flags, tmp_path, cli, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    short = ["--max-steps", "6", "--eval-every", "2", "--batch-size", "4"]
    assert cli("finetune", *flags, *short, "--output", whole).code == 0
    step, done = loop.training_step, []

    def stopping(*given):
        done.append(given)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stopping)
        assert cli("finetune", *flags, *short, "--output", cut).code == 143
    resumed = cli("finetune", "--resume", "--output", cut)
    assert resumed.code == 0, resumed.err
    files = [f / "delta.safetensors" for f in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_merge_writes_the_layer_beside_the_vendors_file(
    trained, files, trusted_tiny, tmp_path, cli
):
    delta, output = trained / "delta.safetensors", tmp_path / "tuned.pth"
    line = ["merge", "--model", trusted_tiny, "--delta", delta, "--output", output]
    done = cli(*line, "--json")
    assert done.code == 0, done.err
    assert "no place for the spin layer" in " ".join(done.err.split())
    beside = tmp_path / "tuned.spin.safetensors"
    assert json.loads(done.out)["spin_layer"] == str(beside)
    assert not DeltaFile.load(beside).changes
    before = pathtune.evaluate(files["test"], trusted_tiny, delta, device="cpu")
    after = pathtune.evaluate(files["test"], str(output), beside, device="cpu")
    for key in ("energy_mae_mev_per_atom", "magforces_mae_mev_per_mu_b"):
        assert after[key] == pytest.approx(before[key], rel=1e-3)
    alone = pathtune.evaluate(files["test"], str(output), device="cpu")
    assert alone["orderings"]["spearman"] is None
    output.unlink()
    refused = cli(*line)
    assert refused.code == 2 and "tuned.spin.safetensors exists" in refused.error


def test_calculator_and_relaxation(trained, files, trusted_tiny):
    delta = trained / "delta.safetensors"
    (atoms,) = ase.io.read(files["test"], ":1")
    atoms.set_initial_magnetic_moments(atoms.arrays["REF_magmoms"])
    atoms.calc = pathtune.calculator(trusted_tiny, delta, device="cpu")
    energy = atoms.get_potential_energy()
    assert energy == pytest.approx(atoms.info["REF_energy"], abs=0.1)
    assert atoms.calc.results["magnetic_forces"].shape == (4, 3)
    atoms.set_initial_magnetic_moments(1.7 * np.eye(3)[[2, 2, 2, 2]])
    up = atoms.get_potential_energy()
    assert up < energy, "the coupling of these frames is ferromagnetic"
    del atoms.arrays["initial_magmoms"]
    atoms.set_initial_magnetic_moments([1.7, -1.7, 1.7, -1.7])
    assert atoms.get_potential_energy() > up
    found = pathtune.relax_spins(atoms, trusted_tiny, delta, n_starts=2, device="cpu")
    assert found.energy == pytest.approx(up, abs=0.02)
    moments = found.atoms.get_initial_magnetic_moments()
    total = np.linalg.norm(moments.sum(0)) / np.linalg.norm(moments, axis=1).sum()
    assert total > 0.98
    with pytest.raises(pathtune.UsageError, match="--spin"):
        pathtune.relax_spins(atoms, trusted_tiny, device="cpu")


def test_spin_layers_are_neither_scaled_nor_added(trained, finished, tmp_path, cli):
    mine, output = trained / "delta.safetensors", tmp_path / "out.safetensors"
    refused = cli("delta", "scale", mine, "0.5", "--output", output)
    assert refused.code == 2 and "cannot be scaled" in refused.error
    refused = cli("delta", "add", finished.delta, mine, "--output", output)
    assert refused.code == 2 and "Only the first" in refused.error
    assert cli("delta", "add", mine, finished.delta, "--output", output).code == 0
    before, after = DeltaFile.load(mine), DeltaFile.load(output)
    assert after.layer.keys() == before.layer.keys()
    assert after.metadata["spin"] == before.metadata["spin"]
    added = cli("inspect", output, "--json")
    assert json.loads(added.out)["new_parameters"] == before.new_parameters


def test_scale_of_magnetic_forces_is_fitted_said_and_kept(flags, files, tmp_path, cli):
    folder = tmp_path / "run"
    near = str(tmp_path / "near.xyz")
    frames = magnets(12)
    for atoms in frames:
        atoms.arrays["REF_magforces"] /= 1.4
    ase.io.write(near, frames)
    short = ["--max-steps", "2", "--output", folder, "--train", near]
    refused = cli("finetune", *flags, *short, "--set", "magforces_scale=fit")
    assert refused.code == 1 and "cannot be fitted" in refused.error
    ase.io.write(near, turned(8, 1.4))
    found = cli("check", near)
    assert "differences 1.4 ±" in found.out
    assert "magforces_scale=fit" in found.out
    done = cli("finetune", *flags, *short, "--set", "magforces_scale=fit")
    assert done.code == 0, done.err
    assert "labels of magnetic forces times 1.4" in done.err
    said = results(folder)["spin"]
    assert said["magforces_scale"] == pytest.approx(1.4, rel=0.01)
    assert said["magforces_scale_fit"]["n_pairs"] >= 5
    delta = folder / "delta.safetensors"
    assert DeltaFile.load(delta).metadata["magforces_scale"] == said["magforces_scale"]
    model = flags[flags.index("--model") + 1]
    # The labels of the test file have scale 1; the delta multiplies them all the same.
    before = results(folder)["test"]["magforces_mae_mev_per_mu_b"]
    after = pathtune.evaluate(files["test"], model, delta, device="cpu")
    assert after["magforces_mae_mev_per_mu_b"] == pytest.approx(before, rel=1e-4)


def turned(n: int, factor: float) -> list[ase.Atoms]:
    """Return frames whose moments turn in small steps, with small magnetic forces."""
    (start,) = magnets(1)
    axis = np.random.default_rng(7).normal(size=(4, 3))
    frames = []
    for index in range(n):
        atoms = start.copy()
        moments = start.arrays["REF_magmoms"] + 0.08 * index * axis
        moments *= 1.7 / np.linalg.norm(moments, axis=1)[:, None]
        i, j, r = neighbor_list("ijd", atoms, 3.2)
        coupling = COUPLING * np.exp((2.5 - r) / RANGE)
        field = np.zeros((4, 3))
        np.add.at(field, i, coupling[:, None] * moments[j])
        atoms.info["REF_energy"] = -float((field * moments).sum()) / 2
        atoms.arrays["REF_magmoms"] = moments
        atoms.arrays["REF_magforces"] = field / factor
        frames.append(atoms)
    return frames


def test_frames_without_moments_are_named(flags, files, tmp_path, cli):
    frames = ase.io.read(files["train"], ":8")
    for atoms in frames[:3]:
        del atoms.arrays["REF_magmoms"], atoms.arrays["REF_magforces"]
    ase.io.write(tmp_path / "some.xyz", frames)
    line = ["finetune", *flags, "--train", tmp_path / "some.xyz", "--max-steps", "2"]
    done = cli(*line, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "3 of 8 train frames (first 0) have neither moments" in said


def test_without_the_flag_moments_are_left_out(files, trusted_tiny, tmp_path, cli):
    line = ["finetune", "--model", trusted_tiny, "--train", files["train"]]
    done = cli(*line, "--max-steps", "1", "--output", tmp_path / "run", "--dry-run")
    assert done.code == 0, done.err
    assert "magmoms; these labels are not trained without --spin" in " ".join(
        done.err.split()
    )


def test_replay_beside_a_spin_layer(flags, tmp_path, cli):
    folder = tmp_path / "run"
    done = cli("finetune", *flags, "--max-steps", "2", "--replay", "4", "-o", folder)
    assert done.code == 0, done.err
    assert "replay: 4 structures" in done.err
