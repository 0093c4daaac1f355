"""The run log: JSON lines, readable lines, TensorBoard."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pathtune.errors import UsageError
from pathtune.training import log


def record(step, best=False):
    return {
        "step": step,
        "train_loss": 0.5,
        "valid_loss": 0.25,
        "valid": {"forces_mae_mev_per_angstrom": 33.5, "n_structures": 2},
        "sparsity": {"total_sparsity": 0.97},
        "layers": {"a": {"updated": 3, "alive": 9, "threshold": [0.1]}},
        "best": best,
    }


def run_log(folder, start=0, **more):
    console = Console(file=io.StringIO(), width=200)
    return log.RunLog(
        folder, console, total_steps=10, start_step=start, **more
    ), console


def test_lines_of_a_later_process_replace_those_after_its_start(tmp_path):
    first, console = run_log(tmp_path)
    with first:
        for step in (0, 5, 10):
            first.evaluation(record(step, best=step == 5))
    text = console.file.getvalue()
    assert "33.50 meV/Å" in text
    assert "3.00 % updated" in text
    assert text.count("best") == 1
    again, _ = run_log(tmp_path, start=5)
    assert again.last_step == 5
    with again:
        again.evaluation(record(8))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 5, 8]


def test_flatten_keeps_numbers_under_their_paths():
    flat = log.flatten(record(3))
    assert flat["valid/forces_mae_mev_per_angstrom"] == 33.5
    assert flat["layers/a/updated"] == 3
    assert "best" not in flat


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = run_log(tmp_path, loggers=("tensorboard",))
    with run:
        run.evaluation(record(4))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("valid_loss")
    assert (scalar.step, scalar.value) == (4, 0.25)


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(log.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"pathtune\[wandb\]"):
        run_log(tmp_path, loggers=("wandb",))
