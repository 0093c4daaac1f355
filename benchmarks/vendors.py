"""The vendors' own trainers, run on the same base, data, batch and number of steps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import ase.io
import numpy as np
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

KEYS = ["--energy_key=energy", "--forces_key=forces", "--stress_key=stress"]


def mace_run_train(
    folder: Path, run: Path, model: str, settings: Mapping[str, Any], log: TextIO
) -> dict[str, Any]:
    """Fine-tune with ``mace_run_train``; return metrics in the shape of ours.

    The loss is ours (Huber, width 0.01, weights 1:10:10). The labels have our
    re-estimated reference energies taken off, because with all elements kept the vendor
    (0.3.16) prints those of ``--E0s=estimated`` and uses the base's. It has no limit on
    steps: the run has as many epochs as hold the same number. Element removal, the
    optimizer and its schedule are the vendor's defaults, with the averaging of weights
    that its guide recommends.
    """
    _write_shifted(folder, run, model)
    frames = ase.io.read(run / "train.xyz", ":")
    batch = settings["batch_size"]
    epochs = settings["max_steps"] * batch // len(frames)
    stress = "stress" in frames[0].calc.results
    arguments = [
        f"--name={run.name}",
        f"--work_dir={run}",
        f"--foundation_model={model}",
        "--multiheads_finetuning=False",
        f"--train_file={run / 'train.xyz'}",
        f"--valid_file={run / 'valid.xyz'}",
        *KEYS,
        "--E0s=foundation",
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
    (history,) = (run / "results").glob("*_train.txt")
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    curve = [
        [(line["epoch"] + 1) * len(frames) // batch, 1000 * line["mae_f"]]
        for line in lines
        if line["mode"] == "eval" and line["epoch"] is not None
    ]
    return {
        "arguments": [a.replace(f"{folder}/", "") for a in arguments],
        "curve": curve,
        "metrics": {
            "zero_shot": _evaluate(run / "test.xyz", model),
            "valid": _evaluate(run / "valid.xyz", tuned),
            "test": _evaluate(run / "test.xyz", tuned),
            "timing": {"seconds_total": seconds},
            "elements": {"base": _elements(model), "tuned": _elements(tuned)},
        },
    }


def sevenn_train(
    folder: Path, run: Path, model: str, settings: Mapping[str, Any], log: TextIO
) -> dict[str, Any]:
    """Fine-tune with ``sevenn train`` and its preset ``fine_tune``.

    Huber loss of width 0.01 and the weights 1:10 of energies and forces are ours; the
    optimizer, its schedule and the weight of stress (in kbar) are the preset's. The
    vendor keeps the base's reference energies, so the labels it gets have our
    re-estimated shifts taken off. It has no limit on steps: the run has as many epochs
    as hold the same number.
    """
    import sevenn
    from sevenn.util import load_checkpoint

    _write_shifted(folder, run, model)
    frames = ase.io.read(run / "train.xyz", ":")
    steps = len(frames) // settings["batch_size"]
    preset = Path(sevenn.__file__).parent / "presets" / "fine_tune.yaml"
    given = yaml.safe_load(preset.read_text(encoding="utf-8"))
    given["model"] = load_checkpoint(model).yaml_dict("continue")["model"]
    given["train"] |= {
        "random_seed": settings["seed"],
        "epoch": settings["max_steps"] // steps,
        "per_epoch": settings["max_steps"],
        "is_train_stress": "stress" in frames[0].calc.results,
        "optim_param": {"lr": settings["lr"]},
        "force_loss_weight": 10.0,
        "error_record": [["Force", "MAE"], ["TotalLoss", "None"]],
    }
    given["train"]["continue"]["checkpoint"] = model
    given["data"] = {
        "batch_size": settings["batch_size"],
        "data_format_args": {"index": ":"},
        "load_trainset_path": [str(run / "train.xyz")],
        "load_validset_path": [str(run / "valid.xyz")],
    }
    (run / "input.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    started = time.perf_counter()
    _call("sevenn", ["train", str(run / "input.yaml"), f"--working_dir={run}"], log)
    seconds = time.perf_counter() - started
    with (run / "lc.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = next(key for key in rows[0] if key.startswith("validset_Force"))
    tuned = str(run / "checkpoint_best.pth")
    return {
        "arguments": given,
        "curve": [[int(r["epoch"]) * steps, 1000 * float(r[name])] for r in rows],
        "metrics": {
            "zero_shot": _evaluate(run / "test.xyz", model),
            "valid": _evaluate(run / "valid.xyz", tuned),
            "test": _evaluate(run / "test.xyz", tuned),
            "timing": {"seconds_total": seconds},
        },
    }


def _write_shifted(folder: Path, run: Path, model: str) -> None:
    """Write the protocol's frames into a run folder, reference energies taken off."""
    import pathtune
    from pathtune import prediction, structures
    from pathtune.structures import reference_energies

    train = structures.read(folder / "train.xyz")
    base = pathtune.load(model, device="cpu", trust_checkpoint=True)
    energies = [float(p["energy"]) for p in prediction.predict(base, list(train))]
    shifts = reference_energies.estimate(train, energies).shifts
    run.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid", "test"):
        frames = ase.io.read(folder / f"{part}.xyz", ":")
        for atoms in frames:
            total = np.sum([shifts[symbol] for symbol in atoms.get_chemical_symbols()])
            labels = {
                "energy": atoms.info.pop("REF_energy") - total,
                "forces": atoms.arrays.pop("REF_forces"),
            }
            if "REF_stress" in atoms.info:
                stress = atoms.info.pop("REF_stress").reshape(3, 3)
                labels["stress"] = full_3x3_to_voigt_6_stress(stress)
            atoms.calc = SinglePointCalculator(atoms, **labels)
        ase.io.write(run / f"{part}.xyz", frames, format="extxyz")


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
