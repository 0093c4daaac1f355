"""The vendors' own trainers, run on the same base, data, batch and number of steps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import ase.io

KEYS = ["--energy_key=REF_energy", "--forces_key=REF_forces", "--stress_key=REF_stress"]


def mace_run_train(
    folder: Path, run: Path, model: str, settings: Mapping[str, Any], log: TextIO
) -> dict[str, Any]:
    """Fine-tune with ``mace_run_train``; return metrics in the shape of ours.

    The loss is ours (Huber, width 0.01, weights 1:10:10) and the reference energies
    are re-estimated (``--E0s=estimated``). The vendor has no limit on steps: the run
    has as many epochs as hold the same number. Element removal, the optimizer and its
    schedule are the vendor's defaults, with the averaging of weights that its guide
    recommends.
    """
    frames = ase.io.read(folder / "train.xyz", ":")
    batch = settings["batch_size"]
    epochs = settings["max_steps"] * batch // len(frames)
    stress = "REF_stress" in frames[0].info
    arguments = [
        f"--name={run.name}",
        f"--work_dir={run}",
        f"--foundation_model={model}",
        "--multiheads_finetuning=False",
        f"--train_file={folder / 'train.xyz'}",
        f"--valid_file={folder / 'valid.xyz'}",
        *KEYS,
        "--E0s=estimated",
        "--loss=huber",
        "--energy_weight=1",
        "--forces_weight=10",
        f"--stress_weight={10 * stress}",
        f"--lr={settings['lr']}",
        f"--batch_size={batch}",
        "--valid_batch_size=20",
        f"--max_num_epochs={epochs}",
        f"--eval_interval={max(1, epochs // 20)}",
        "--ema",
        "--ema_decay=0.99",
        "--default_dtype=float32",
        "--device=cpu",
        f"--seed={settings['seed']}",
        *[f"--{k}={v}" for k, v in settings.get("vendor_options", {}).items()],
    ]
    started = time.perf_counter()
    _call("mace_run_train", arguments, log)
    seconds = time.perf_counter() - started
    tuned = str(run / f"{run.name}.model")
    return {
        "arguments": [a.replace(f"{folder}/", "") for a in arguments],
        "metrics": {
            "zero_shot": _evaluate(folder / "test.xyz", model),
            "valid": _evaluate(folder / "valid.xyz", tuned),
            "test": _evaluate(folder / "test.xyz", tuned),
            "timing": {"seconds_total": seconds},
            "elements": {"base": _elements(model), "tuned": _elements(tuned)},
        },
    }


def _call(command: str, arguments: list[str], log: TextIO) -> None:
    program = Path(sys.executable).with_name(command)
    subprocess.run([program, *arguments], check=True, stdout=log, stderr=log)


def _evaluate(data: Path, model: str) -> dict[str, Any]:
    """Return pathtune's errors of a model on a file, by the command line."""
    line = ["evaluate", str(data), "--model", model, "--json", "--trust-checkpoint"]
    done = subprocess.run(
        [sys.executable, "-m", "pathtune", *line], check=True, capture_output=True
    )
    return json.loads(done.stdout)


def _elements(model: str) -> int:
    import pathtune

    return len(pathtune.load(model, device="cpu", trust_checkpoint=True).elements)
