"""Runs on data that stay in their file, and steps cut into parts."""

from __future__ import annotations

import json
import os
import shutil
import signal

import ase.io
import pytest
import torch
import yaml

from pathtune import delta as deltas
from pathtune import discovery, structures
from pathtune.config import RunConfig
from pathtune.deltafile import DeltaFile
from pathtune.loading import load
from pathtune.training.data import Batch, Frames, Source
from pathtune.training.loop import backward
from tests.conftest import crystals, molecules
from tests.e2e.conftest import run_process
from tests.e2e.test_distributed import close

pytestmark = [
    pytest.mark.sevennet,
    # Python 3.12 and newer warn of what the loader of PyTorch does.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Write a database of training frames and files of molecules and crystals."""
    folder = tmp_path_factory.mktemp("files")
    made = {}
    for seed, (name, n) in enumerate({"train": 9, "test": 2}.items()):
        made[name] = str(folder / f"{name}.xyz")
        ase.io.write(made[name], molecules(n, seed) + crystals(n, seed))
    return made


@pytest.fixture
def start(files, trusted_tiny) -> list:
    flags = ["--model", trusted_tiny, "--train", files["train"]]
    return ["finetune", *flags, "--test", files["test"], "--eval-every", 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_stored_frames_is_the_run_in_memory(start, cli, tmp_path, workers):
    memory, stored = tmp_path / "memory", tmp_path / "stored"
    line = [*start, "--max-steps", 9, "--batch-size", 4]
    assert cli(*line, "--output", memory).code == 0
    read = ["--stream-above", 0, "--workers", workers, "--output", stored]
    outcome = cli(*line, *read)
    assert outcome.code == 0
    assert "is not kept in memory" in outcome.err
    close(memory, stored, 1e-6)
    ours, theirs = (
        json.loads((f / "metrics.json").read_text()) for f in (stored, memory)
    )
    for split in ("zero_shot", "zero_shot_raw", "valid", "test"):
        assert ours[split].pop("by_config_type", None) == theirs[split].pop(
            "by_config_type", None
        )
        assert ours[split] == pytest.approx(theirs[split], rel=1e-4)
    one, other = (DeltaFile.load(f / "delta.safetensors") for f in (memory, stored))
    assert one.metadata["data"] == other.metadata["data"]


def test_a_stored_run_that_is_interrupted_resumes(start, cli, tmp_path):
    """The workers leave signals to the process that trains, and end with it."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    line = [*start, "--max-steps", 9, "--batch-size", 4, "--stream-above", 0]
    line += ["--workers", 1]
    assert cli(*line, "--output", whole).code == 0
    before = """
import os, signal
from pathtune.training import loop
step, count = loop.training_step, 0
def training_step(*args, **options):
    global count
    count += 1
    if count == 4:
        os.killpg(0, signal.SIGINT)
    return step(*args, **options)
loop.training_step = training_step
os.setpgid(0, 0)
"""
    stopped = run_process(*line, "--output", output, before=before)
    assert stopped.code == 130, stopped.err
    assert "stopped at step 4 of 9" in stopped.error
    # What is read how is free to change.
    resumed = cli("finetune", "--resume", "--output", output, "--stream-above", 64)
    assert resumed.code == 0, resumed.err
    close(whole, output, 1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("open({train!r}, 'w').close()", "ASE cannot read this frame"),
        (
            "[os.kill(p.pid, 9) for p in multiprocessing.active_children()]",
            "lower --workers",
        ),
    ],
)
def test_a_worker_that_fails_ends_the_run(start, cli, tmp_path, spoil, message):
    start[4] = shutil.copy(start[4], tmp_path / "train.xyz")
    line = [*start, "--max-steps", 9, "--batch-size", 4, "--stream-above", 0]
    before = f"""
import multiprocessing, os
from pathtune.training import loop
step = loop.training_step
def training_step(*args, **options):
    {spoil.format(train=str(start[4]))}
    return step(*args, **options)
loop.training_step = training_step
"""
    line += ["--workers", 1, "--output", tmp_path / "run"]
    stopped = run_process(*line, before=before)
    assert stopped.code == 1
    assert message in stopped.error


def test_steps_in_parts_are_the_same_run(start, cli, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    line = [*start, "--max-steps", 9, "--batch-size", 6]
    assert cli(*line, "--output", whole).code == 0
    bounds = ["--max-edges-per-batch", 150, "--max-atoms-per-batch", 12]
    assert "150 edges" in (outcome := cli(*line, *bounds, "--output", parts)).err
    assert outcome.code == 0
    close(whole, parts, 1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-12)])
def test_the_gradient_of_a_batch_in_parts(files, trusted_tiny, dtype, bound):
    backend = load(trusted_tiny, dtype=dtype, device="cpu")
    method = discovery.load("methods", "full")
    weights = dict(backend.model.named_parameters())
    delta = deltas.build(
        backend.path_weights(), weights, method=method, config=method.Config(),
        selection="all", elements=["H", "C", "O", "Cu"], head=None, seed=0,
    )  # fmt: skip
    source = Source(
        Frames.prepare(backend, structures.read(files["train"])),
        {"energy": 1.0, "forces": 10.0, "stress": 10.0},
    )
    parameters = list(delta.change.parameters())
    rows, found = list(range(18)), []
    for size in (18, 1, 7):
        parts = [source.frames.part(rows[i : i + size]) for i in range(0, 18, size)]
        run = RunConfig(model="m", train="t", dtype=dtype)
        backward(delta, parameters, Batch(source, rows, parts), run)
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        delta.zero_grad()
    for other in found[1:]:
        assert (other - found[0]).norm() / found[0].norm() < bound


def test_tf32_is_for_gpus(start, cli, tmp_path):
    refused = cli(*start, "--tf32", "--output", tmp_path / "run")
    assert refused.code == 2 and "float32 on cpu" in refused.error


def test_batches_by_work_resume_without_a_sampler(start, cli, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    line = [*start, "--max-epochs", 3, "--max-edges-per-batch", 250]
    assert cli(*line, "--output", whole).code == 0
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 3 and last["step"] > 3
    before = """
import os, signal
from pathtune.training import loop
step, count = loop.training_step, 0
def training_step(*args, **options):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **options)
loop.training_step = training_step
"""
    stopped = run_process(*line, "--output", output, before=before)
    assert stopped.code == 128 + signal.SIGTERM, stopped.err
    assert cli("finetune", "--resume", "--output", output).code == 0
    a, b = ((f / "delta.safetensors").read_bytes() for f in (whole, output))
    assert a == b


def test_the_largest_batch_is_measured(start, cli, tmp_path):
    output = tmp_path / "run"
    line = [*start, "--max-steps", 2, "--max-edges-per-batch", "auto"]
    refused = cli(*line, "--output", output)
    assert refused.code == 2 and "--memory-limit" in refused.error
    done = cli(*line, "--memory-limit", 8, "--output", output)
    assert done.code == 0, done.err
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert isinstance(settings["max_edges_per_batch"], int)
    assert f"batch up to {settings['max_edges_per_batch']} edges" in done.err
    assert os.path.exists(output / "delta.safetensors")


def test_check_of_stored_frames(files, trusted_tiny, cli, monkeypatch):
    line = ["check", files["train"], "--model", trusted_tiny, "--against"]
    line += [files["test"], "--json"]
    listed = cli(*line)
    monkeypatch.setitem(structures.read.__kwdefaults__, "stream_above", 0)
    stored = cli(*line)
    assert (listed.code, listed.out) == (stored.code, stored.out)
    assert json.loads(stored.out)["n_structures"] == 18
