"""A run that is killed and resumed is the uninterrupted run, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Run, command, environment, run_process

pytestmark = pytest.mark.sevennet

# Kill this process at the n-th write of the training checkpoint: "torn" when half
# of its bytes are written, "flushed" when all are but the file is not renamed yet.
BREAK = """
import os, signal
from pathlib import Path
from pathtune import files

count = 0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def write_bytes(path, content):
    global count
    if path.name == "last.pt":
        count += 1
    if path.name != "last.pt" or count < {n}:
        return files.write_atomically(path, lambda p: p.write_bytes(content))
    with files.replacing(path) as temporary:
        if {moment!r} == "torn":
            temporary.write_bytes(content[: len(content) // 2])
            kill()
        temporary.write_bytes(content)
        os.replace = lambda source, target: kill()

files.write_bytes = write_bytes
"""


@pytest.fixture
def start(finished, trusted_tiny, tmp_path):
    """Return the flags that start the finished run again in a new folder."""
    output = tmp_path / "run"
    flags = [*finished.flags, "--test", finished.test, "--output", output]
    return ["finetune", *flags, "--max-steps", 6, "--eval-every", 2], output


def _same(output: Path, run: Run) -> None:
    delta = (output / "delta.safetensors").read_bytes()
    assert delta == run.delta.read_bytes()
    records = [
        [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (output, run.folder)
    ]
    assert records[0] == records[1]
    ours, theirs = (
        json.loads((f / "metrics.json").read_text()) for f in (output, run.folder)
    )
    del ours["timing"], theirs["timing"]
    assert ours == theirs


@pytest.mark.parametrize("moment", ["torn", "flushed"])
def test_killed_inside_a_checkpoint_write(moment, start, finished, cli):
    line, output = start
    killed = run_process(*line, before=BREAK.format(n=3, moment=moment))
    assert killed.code == -signal.SIGKILL, killed.err
    last = output / "checkpoints" / "last.pt"
    assert last.exists(), "the second checkpoint is still there"
    half = [p for p in last.parent.iterdir() if p != last]
    assert half, "the kill came while the third was written"
    assert cli("finetune", "--resume", "--output", output).code == 0
    assert list(last.parent.iterdir()) == [last], "the torn file is gone"
    _same(output, finished)


def test_killed_in_the_first_checkpoint_write(start, finished, cli):
    line, output = start
    killed = run_process(*line, before=BREAK.format(n=1, moment="torn"))
    assert killed.code == -signal.SIGKILL, killed.err
    assert not (output / "checkpoints" / "last.pt").exists()
    assert cli("finetune", "--resume", "--output", output).code == 0
    _same(output, finished)


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _wait(process: subprocess.Popen, ready, limit: float = 120.0) -> None:
    """Wait until `ready()` or until the process ends by itself."""
    deadline = time.monotonic() + limit
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "the process does not come this far"
        time.sleep(0.002)


def test_killed_again_and_again(start, finished, cli, tmp_path):
    """SIGKILL at random moments, twice in a row, then on to the end."""
    line, output = start
    # Long enough that no machine finishes between two looks at the log.
    line[line.index("--max-steps") + 1] = 150
    whole = Run(tmp_path / "whole", finished.model, *[""] * 3)
    assert cli(*line, "--output", whole.folder).code == 0
    chance = random.Random(0)
    for attempt in range(2):
        goes_on = line if attempt == 0 else ["finetune", "--resume", "-o", output]
        process = subprocess.Popen(
            command(*goes_on), env=environment(), stderr=subprocess.DEVNULL
        )
        # Lines after the checkpoint are dropped first, so wait for one more than all.
        seen = _lines(output / "metrics.jsonl")
        _wait(process, lambda n=seen: _lines(output / "metrics.jsonl") > n)
        time.sleep(chance.uniform(0.0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was too fast to be killed"
        assert not (output / "metrics.json").exists()
    assert cli("finetune", "--resume", "--output", output).code == 0
    _same(output, whole)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(
    name, code, finished, start, cli
):
    line, output = start
    # The signal arrives while the third step is computed.
    before = f"""
import os, signal
from pathtune.training import loop
step, count = loop.training_step, 0
def training_step(*args, **options):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.{name})
    return step(*args, **options)
loop.training_step = training_step
"""
    stopped = run_process(*line, before=before)
    assert stopped.code == code
    assert "stopped at step 3 of 6" in stopped.error
    assert f"pathtune finetune --resume --output {output}" in stopped.error
    assert (output / "checkpoints" / "last.pt").exists()
    assert not (output / "metrics.json").exists()
    assert cli("finetune", "--resume", "--output", output).code == 0
    _same(output, finished)


def test_a_real_ctrl_c(finished, start, cli):
    """A signal from outside, at whatever step it meets."""
    line, output = start
    # Long enough that no machine finishes between two looks at the log.
    line[line.index("--max-steps") + 1] = 15000
    process = subprocess.Popen(
        command(*line), env=environment(), stderr=subprocess.PIPE, text=True
    )
    _wait(process, lambda: _lines(output / "metrics.jsonl") >= 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "--resume --output" in err


def test_resuming_a_finished_run_changes_nothing(start, finished, cli):
    line, output = start
    assert cli(*line).code == 0
    times = {p: os.stat(p).st_mtime_ns for p in output.rglob("*")}
    again = cli("finetune", "--resume", "--output", output, "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads((output / "metrics.json").read_text())
    assert "nothing to do" in " ".join(again.err.split())
    assert {p: os.stat(p).st_mtime_ns for p in output.rglob("*")} == times
    _same(output, finished)


def test_resume_of_a_run_that_never_started(start, finished, cli):
    """A job script that always says --resume works the first time, too."""
    line, output = start
    assert cli(*line, "--resume").code == 0
    _same(output, finished)


def test_killed_before_the_results_are_written(start, finished, cli):
    line, output = start
    assert cli(*line).code == 0
    for name in ("metrics.json", "delta.safetensors"):
        (output / name).unlink()
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "torn')
    assert cli("finetune", "--resume", "--output", output).code == 0
    _same(output, finished)
    timing = json.loads((output / "metrics.json").read_text())["timing"]
    assert 0 < timing["seconds_per_step"] < timing["seconds_total"]


def test_ctrl_c_before_the_first_step(start, cli, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    line, output = start
    monkeypatch.setattr("pathtune.plan.load", interrupted)
    outcome = cli(*line)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert not output.exists()
