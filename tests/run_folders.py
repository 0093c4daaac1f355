"""Run folders made up without a model, to draw reports of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.build
import numpy as np
import torch
from ase import Atoms

from pathtune import files, metrics, robustness, structures
from pathtune.config import RunConfig
from pathtune.deltafile import Change, DeltaFile
from pathtune.properties import Prediction, Structure
from pathtune.provenance import environment

LAYERS = ("embedding", "0", "1", "readout")
NAME = "layer_{}.linear.weight"


def labelled(
    n: int,
    *,
    stress: bool = True,
    magmoms: bool = False,
    config_types: Sequence[str] = ("default",),
    repeat: int = 1,
) -> list[Structure]:
    """Return rattled rock-salt cells with made-up labels."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(n):
        atoms = ase.build.bulk("NiO", "rocksalt", a=4.2, cubic=True) * (repeat, 1, 1)
        atoms.rattle(0.05, seed=index)
        labels = {
            "energy": np.array(-6.0 * len(atoms) + generator.normal(0, 0.2)),
            "forces": generator.normal(0, 1.0, (len(atoms), 3)),
        }
        if stress:
            labels["stress"] = generator.normal(0, 0.02, 6)
        if magmoms:
            spins = generator.normal(0, 1.0, (len(atoms), 3))
            labels["magmoms"] = np.where(
                (atoms.symbols == "Ni")[:, None], 1.7 * spins, np.nan
            )
            labels["magforces"] = 0.1 * spins
        kind = config_types[index % len(config_types)]
        atoms.info["config_type"] = kind
        found.append(Structure(atoms, labels, config_type=kind))
    return found


def predictions(
    frames: Sequence[Structure], error: float, seed: int
) -> list[Prediction]:
    """Return the labels with errors of a relative size."""
    generator = np.random.default_rng(seed)
    return [
        {
            name: np.nan_to_num(label)
            + error
            * np.nanstd(np.append(label, 0.1))
            * generator.normal(size=label.shape)
            * (0.05 if name == "energy" else 1.0)
            for name, label in s.labels.items()
        }
        for s in frames
    ]


def make(
    folder: Path,
    *,
    frames: Sequence[Structure] | None = None,
    has_test: bool = True,
    error_before: float = 0.5,
    error: float = 0.1,
    evaluations: int = 9,
    retention: dict[str, Any] | None = None,
    is_streamed: bool = False,
    has_explanation: bool = True,
    command: str = "pathtune finetune --model 7net-0 --train train.xyz",
    **settings: Any,
) -> Path:
    """Write a run folder as `pathtune finetune` leaves it, checkpoints apart.

    Parameters
    ----------
    folder
        Where.
    frames
        Judged structures.
    has_test, is_streamed, has_explanation
        What there is.
    error_before, error
        Of the base and of the tuned model, relative to the spread of the labels.
    evaluations
        Lines of metrics.jsonl.
    retention
        Changes of ``retention``; ``{"none": True}`` leaves it out.
    command
        The command line.
    **settings
        Of the run.
    """
    frames = labelled(12) if frames is None else frames
    before, after = predictions(frames, error_before, 1), predictions(frames, error, 2)
    part = "test" if has_test else "valid"
    if not is_streamed:
        for suffix, predicted in (("", after), ("_zero_shot", before)):
            structures.write_predictions(
                folder / "predictions" / f"{part}{suffix}.xyz", frames, predicted
            )
    judged = metrics.errors(frames, after)
    config = RunConfig(
        **{
            "model": "7net-0",
            "train": "train.xyz",
            "test": "test.xyz" if has_test else None,
            "output": folder.name,
            "preset": "high",
            "max_steps": 100,
            **settings,
        }
    )
    files.write_text(folder / "config.yaml", config.to_yaml())
    files.write_json(folder / "environment.json", environment() | {"command": command})
    lines = [
        _record(step, share, metrics.errors(frames, after), step == 100)
        for step, share in zip(
            np.linspace(0, 100, evaluations).astype(int).tolist(),
            np.linspace(0.5, 0.03, evaluations).tolist(),
            strict=True,
        )
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files.write_text(folder / "metrics.jsonl", text)
    measured = {
        "n_structures": 40,
        "n_left_out": 0,
        "energy_drift_mev_per_atom": 9.5,
        "forces_drift_mev_per_angstrom": 12.5,
        "forces_base_mev_per_angstrom": 250.0,
        "dimers": {
            "n_pairs": 3,
            "base_hole_fraction": 0.0,
            "hole_fraction": 0.0,
            "new_holes": [],
        },
        "nve": {
            "n_atoms": 8,
            "n_steps": 100,
            "time_step_fs": 1.0,
            "exploded": False,
            "energy_drift_mev_per_atom_per_ps": -0.4,
        },
    }
    retention = retention or {}
    survey = structures.survey(frames)
    n_updated = 3000
    results = {
        "zero_shot": metrics.errors(frames, before),
        "zero_shot_raw": metrics.errors(frames, before),
        "valid": judged,
        "test": judged if has_test else None,
        "sparsity": {
            "total_sparsity": 0.97,
            "active_sparsity": 0.95,
            "updated_parameters": n_updated,
            "alive_parameters": 60_000,
            "total_parameters": 100_000,
        },
        "retention": None if "none" in retention else measured | retention,
        "reference_energies": {
            "mode": "estimated",
            "base": {"Ni": -5.5, "O": -4.5},
            "shifts": {"Ni": 0.25, "O": -0.5},
        },
        "data": {
            "train": {
                "n_structures": 40,
                "n_atoms": 320,
                "elements": list(survey.elements),
                "labels": {k: 40 for k, n in survey.counts.items() if n},
                "label_keys": {"energy": "REF_energy", "forces": "REF_forces"},
            }
        },
        "best_step": 100,
        "steps": 100,
        "timing": {
            "seconds_per_step": 0.2,
            "seconds_total": 21.0,
            "peak_memory_mib": 500.0,
        },
    }
    files.write_json(folder / "metrics.json", results)
    if "none" not in retention:
        curves = robustness.curves(_dimer(1.0), _dimer(1.2), [("Ni", "O"), ("O", "O")])
        files.write_json(folder / "short_range.json", curves)
    change = Change(torch.arange(3), torch.tensor([0.1, -0.2, 0.3]).double(), (10,))
    delta = DeltaFile(
        {NAME.format("0"): change},
        {"Ni": 0.25, "O": -0.5},
        {
            "model": "7net-0",
            "backend": "sevennet",
            "elements": ["Ni", "O"],
            "data": {"train": "0123456789abcdef" * 4, "n_train": 40, "n_replay": 0},
            "licence": "that of the foundation model",
        },
    )
    delta.save(folder / "delta.safetensors")
    if has_explanation:
        files.write_json(folder / "explain" / "explain.json", _explanation())
    return folder


def _record(
    step: int, share: float, valid: dict[str, Any], best: bool
) -> dict[str, Any]:
    scale = 1 + 30 * share**2
    valid = {
        k: v if k == "n_structures" else v * scale
        for k, v in valid.items()
        if k != "by_element"
    }
    return {
        "step": step,
        "epoch": step / 10,
        "train_loss": 0.01 * scale if step else None,
        "valid_loss": 0.012 * scale,
        "valid": valid,
        "sparsity": {
            "total_sparsity": 1 - share,
            "active_sparsity": 1 - share,
            "updated_parameters": int(1e5 * share),
            "alive_parameters": 60_000,
            "total_parameters": 100_000,
        },
        "layers": {
            NAME.format(layer): {
                "updated": int(1e3 * share * (1 + index / 4)),
                "alive": 1500,
                "threshold": [1e-3 * (1 + step / 20 + index)],
            }
            for index, layer in enumerate(LAYERS)
        },
        "best": best,
    }


def _dimer(depth: float):
    def predict(pairs: Sequence[Structure]) -> list[Prediction]:
        x = [s.atoms.get_distance(0, 1) / 1.4 for s in pairs]
        return [{"energy": np.array(depth * (d**-8 - 2 * d**-4))} for d in x]

    return predict


def _counts(index: int) -> dict[str, Any]:
    updated = 60 * (index + 1)
    return {
        "entries": 1500,
        "alive": 1200,
        "updated": updated,
        "density": updated / 1200,
        "norm": 0.1 * (index + 1),
        "relative_norm": 0.02 * (index + 1),
        "one_minus_r2": 0.001 * (index + 1),
        "largest": 0.05,
        "share": (index + 1) / 20,
    }


def _explanation() -> dict[str, Any]:
    cells = [
        {"layer": layer, "degree": degree, "element": element, **_counts(index)}
        for index, (layer, degree, element) in enumerate(
            [
                ("embedding", 0, "Ni"),
                ("embedding", 0, "O"),
                ("0", 0, None),
                ("0", 1, None),
                ("1", 0, None),
                ("1", 2, "Ni"),
                ("readout", None, None),
            ]
        )
    ]
    parameters = [
        {
            "parameter": NAME.format(x),
            "layer": x,
            "kind": "linear",
            "role": "interaction",
        }
        | _counts(index)
        for index, x in enumerate(LAYERS)
    ]
    return {
        "tables": {"cell": cells, "parameter": parameters},
        "ranking": sorted(cells, key=lambda row: -row["share"]),
        "remarks": ["Channels are no orbitals."],
    }


def with_names(frames: Sequence[Structure], name: str) -> list[Structure]:
    """Return frames whose configuration type is a name."""
    renamed = []
    for s in frames:
        atoms: Atoms = s.atoms.copy()
        atoms.info["config_type"] = name
        renamed.append(replace(s, atoms=atoms, config_type=name))
    return renamed
