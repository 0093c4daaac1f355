"""Several processes are one run: same result, one writer, a common end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathtune.deltafile import DeltaFile
from tests.e2e.conftest import command, environment
from tests.e2e.test_resume import _lines, _wait

pytestmark = pytest.mark.sevennet


def torchrun(n: int, *args) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes, as users start it."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(n), *command(*args)[1:]]
    return subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=300
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def srun(n: int, *args) -> list[subprocess.Popen[str]]:
    """Start a command in several processes as SLURM's srun does."""
    common = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NUM_TASKS": str(n),
        "SLURM_STEP_TASKS_PER_NODE": str(n),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            command(*args),
            env=environment()
            | common
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


@pytest.fixture
def start(finished, trusted_tiny) -> list:
    flags = [*finished.flags, "--test", finished.test, "--batch-size", 5]
    return ["finetune", *flags, "--eval-every", 4]


def close(first: Path, second: Path, tolerance: float) -> None:
    """Compare two runs: what was recorded, and the values of the deltas."""
    for one, other in zip(
        *((f / "metrics.jsonl").read_text().splitlines() for f in (first, second)),
        strict=True,
    ):
        a, b = json.loads(one), json.loads(other)
        assert a["step"] == b["step"] and a["best"] == b["best"]
        for key in ("valid_loss", "train_loss"):
            if a[key] is not None:
                assert b[key] == pytest.approx(a[key], rel=tolerance), key
    a, b = (DeltaFile.load(f / "delta.safetensors") for f in (first, second))
    assert a.shifts == pytest.approx(b.shifts, abs=1e-9)
    assert a.changes.keys() == b.changes.keys()
    for name, change in a.changes.items():
        difference = (change.dense() - b.changes[name].dense()).abs().max().item()
        assert difference < tolerance, name


@pytest.mark.parametrize("parts", [(), ("--max-atoms-per-batch", 12)])
def test_two_processes_are_one(start, cli, tmp_path, parts):
    """Five structures a step on two processes, and cut into parts on each."""
    one, two = tmp_path / "one", tmp_path / "two"
    line = [*start, "--max-steps", 20]
    assert cli(*line, "--output", one).code == 0
    done = torchrun(2, *line, *parts, "--output", two, "--json")
    assert done.returncode == 0, done.stderr
    close(one, two, 1e-6)
    # One process writes and prints.
    assert json.loads(done.stdout) == json.loads((two / "metrics.json").read_text())
    assert done.stderr.count("zero-shot MAE, raw") == 1
    assert "2 processes" in done.stderr


def test_an_error_is_told_once(start, tmp_path):
    output = tmp_path / "run"
    processes = srun(2, *start, "--head", "PBE", "--output", output)
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "".join(told).count("pathtune: error:") == 1
    assert not output.exists()


def test_a_killed_process_ends_the_run_which_resumes(start, cli, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    line = [*start, "--max-steps", 150]
    assert cli(*line, "--output", whole).code == 0
    first, second = srun(2, *line, "--output", output)
    _wait(first, lambda: _lines(output / "metrics.jsonl") >= 3)
    second.kill()
    killed = time.monotonic()
    _, told = first.communicate(timeout=60)
    assert first.returncode == 1 and time.monotonic() - killed < 30
    assert "lost another process" in told and "--resume" in told
    assert "Traceback" not in told
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert not (output / "metrics.json").exists()
    assert cli("finetune", "--resume", "--output", output).code == 0
    close(whole, output, 1e-5)


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_one_process_stops_all(start, cli, tmp_path, signum, code):
    output = tmp_path / "run"
    line = [*start, "--max-steps", 15000]
    processes = srun(2, *line, "--output", output)
    _wait(processes[0], lambda: _lines(output / "metrics.jsonl") >= 2)
    os.kill(processes[1].pid, getattr(signal, signum))
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code]
    assert "".join(told).count("stopped at step") == 1
    assert (output / "checkpoints" / "last.pt").exists()
