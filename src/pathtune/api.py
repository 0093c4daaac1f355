"""The verbs load, finetune, evaluate, merge, calculator; the CLI calls them too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import track

from pathtune import (
    acceleration,
    files,
    metrics,
    modelcard,
    report,
    robustness,
    structures,
)
from pathtune import delta as deltas
from pathtune.backends.base import Backend, require_elements
from pathtune.config import RunConfig, read_yaml, validate
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.explain import explain
from pathtune.loading import licence, load, load_with_delta, models
from pathtune.merging import merge
from pathtune.orderings import compare as compare_orderings
from pathtune.plan import Plan, dry_run, prepare, print_plan
from pathtune.prediction import predict, unshifted
from pathtune.properties import Prediction, Property, Structure
from pathtune.provenance import environment, versions
from pathtune.spin.backend import SpinBackend
from pathtune.spin.relax import RelaxedSpins
from pathtune.spin.relax import relax_spins as spin_relaxation
from pathtune.training import distributed, memory
from pathtune.training.data import EVALUATED_AT_ONCE, Frames
from pathtune.training.loop import train

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

__all__ = [
    "calculator",
    "dry_run",
    "evaluate",
    "finetune",
    "load",
    "merge",
    "models",
    "relax_spins",
    "resume_config",
]

DELTA, CONFIG, METRICS = "delta.safetensors", "config.yaml", "metrics.json"
ENVIRONMENT, PREDICTIONS = "environment.json", "predictions"
EXPLANATION = "explain"
SHORT_RANGE = "short_range.json"
# Settings whose resolved value need not look like the given one. Given again on
# resuming they are resolved again, and the run's identity decides.
_RESOLVED = (
    *("output", "device", "batch_size", "max_epochs", "method_options"),
    *("max_atoms_per_batch", "max_edges_per_batch", "memory_limit"),
    *("stream_above", "workers", "retention", "magforces_scale"),
)


def finetune(
    config: RunConfig, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tune a foundation model and write the run folder.

    Parameters
    ----------
    config
        The settings; what is None is chosen from the data and the method.
    resume
        Continue the run in ``config.output`` (see `resume_config`).
    console
        Where progress is shown; standard error by default.

    Returns
    -------
    dict
        The content of ``metrics.json``.

    Raises
    ------
    UsageError
        If settings do not fit, or the output folder is not empty.
    PathtuneError
        If data, model or run fail a check.
    Interrupted
        After Ctrl-C or SIGTERM, with a checkpoint written.
    """
    with distributed.session():
        console = distributed.only_main(console or Console(stderr=True, markup=False))
        folder = Path(config.output)
        finished = distributed.from_main(lambda: _finished(folder, resume))
        if finished is not None:
            console.print(f"{folder} is finished; nothing to do")
            return finished
        return _finetune(config, folder, console)


def _finished(folder: Path, resume: bool) -> dict[str, Any] | None:
    """Return the results of a finished run that is resumed; refuse to overwrite one."""
    if resume and (folder / METRICS).exists():
        try:
            return dict(json.loads((folder / METRICS).read_text(encoding="utf-8")))
        except ValueError as error:
            raise PathtuneError(
                f"{folder / METRICS} is damaged; delete it and resume again"
            ) from error
    if (
        not resume
        and folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UsageError(
            f"{folder} exists and is not empty: choose another --output, or continue "
            f"it with --resume --output {folder}"
        )
    return None


def _finetune(config: RunConfig, folder: Path, console: Console) -> dict[str, Any]:
    plan = prepare(config, console)
    is_main = distributed.rank() == 0
    if is_main and not (folder / CONFIG).exists():
        files.write_json(folder / ENVIRONMENT, environment())
        files.write_text(folder / CONFIG, plan.config.to_yaml())
    print_plan(plan, console)
    outcome = train(
        plan.delta,
        plan.sources,
        plan.valid,
        plan.config,
        folder=folder,
        console=console,
        identity=plan.identity,
    )
    backend = plan.backend
    changes = plan.delta.changes(backend.stored_weights())
    layer = plan.delta.stored_layer()
    saved = DeltaFile(changes, plan.references.shifts, {}, layer)
    results: dict[str, Any] = {
        "zero_shot": plan.zero_shot,
        "zero_shot_raw": plan.zero_shot_raw,
        "valid": _evaluated(plan, saved, "valid", plan.valid, folder),
        "test": _evaluated(plan, saved, "test", plan.test, folder)
        if plan.test
        else None,
        "sparsity": deltas.sparsity(
            saved.updated_parameters,
            plan.delta.alive,
            backend.total_parameters,
            saved.new_parameters,
        ),
        **_magnetism(plan),
        "retention": distributed.from_main(lambda: _retention(plan, saved, folder)),
        "reference_energies": {
            "mode": plan.config.reference_energies,
            "base": {
                e: backend.reference_energies()[e] for e in plan.references.shifts
            },
            "shifts": dict(plan.references.shifts),
        },
        "data": _data(plan),
        "best_step": outcome.best_step,
        "steps": outcome.steps,
    }
    saved = dataclasses.replace(saved, metadata=_metadata(plan, saved, results))
    results["timing"] = {
        "seconds_per_step": outcome.seconds_per_step,
        "seconds_total": outcome.seconds_total,
        "peak_memory_mib": memory.peak_mib(backend.device),
    }
    if is_main:
        saved.save(folder / DELTA)
        alive = {t.weight.name: t.indices for t in plan.delta.targets}
        explained = explain(backend, saved, alive=alive, name=folder.name)
        explained.write(folder / EXPLANATION)
        machine = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        card = modelcard.render(
            saved,
            name=folder.name,
            results=results,
            command=machine.get("command"),
        )
        files.write_text(folder / modelcard.CARD, card)
        files.write_json(folder / METRICS, results)
        report.write([folder])
    if outcome.steps and outcome.best_step == 0:
        console.print(
            "warning: no evaluation was better than the start; the result is the "
            "untrained model. Lower --lr, or look at the validation frames"
        )
    return results


def resume_config(folder: Path, given: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run folder; refuse different ones.

    Parameters
    ----------
    folder
        Run folder.
    given
        Settings given again on the command line.

    Raises
    ------
    UsageError
        If the folder holds no run, or `given` differs from it.
    """
    if not (folder / CONFIG).exists():
        if "model" in given and "train" in given:
            return validate(RunConfig, given, "setting")
        raise UsageError(
            f"{folder} holds no run to resume ({CONFIG} is missing); start one with "
            "--model and --train"
        )
    stored = validate(RunConfig, read_yaml(folder / CONFIG), "setting")
    dumped = stored.model_dump(mode="json")
    complete = {"model": stored.model, "train": stored.train, **given}
    normal = validate(RunConfig, complete, "setting")
    given = normal.model_dump(mode="json", include=set(given))
    for key, value in given.items():
        if key not in _RESOLVED and dumped[key] != value:
            raise UsageError(
                f"{folder} was started with {key} = {dumped[key]!r}, not {value!r}; "
                "resume without it, or choose another --output"
            )
    again = {key: given[key] for key in _RESOLVED if key in given}
    if again.get("max_edges_per_batch") == "auto":
        del again["max_edges_per_batch"]  # measured when the run began
    if "max_epochs" in again:
        again["max_steps"] = None
    if "method_options" in again:
        again["method_options"] = stored.method_options | again["method_options"]
    return validate(RunConfig, dumped | again, "setting")


def _evaluated(
    plan: Plan, saved: DeltaFile, name: str, frames: Frames, folder: Path
) -> dict[str, Any]:
    """Return errors of base + delta as any later user of the file will see them.

    The predictions of frames in memory are written beside those of the base.
    """
    sums = metrics.Sums()
    kept: dict[int, Prediction] = {}
    passes = frames.passes(
        range(len(frames)), plan.config, plan.config.batch_size or EVALUATED_AT_ONCE
    )
    for part, predictions in frames.predictions(
        passes,
        weights=saved.merged(plan.backend.stored_weights()),
        shifts=saved.shifts,
    ):
        sums.add(part.structures, predictions)
        if name in plan.zero_shot_predictions:
            kept |= zip(part.rows, predictions, strict=True)
    shares = distributed.gather((sums, kept))
    if name in plan.zero_shot_predictions and distributed.rank() == 0:
        for _, others in shares:
            kept |= others
        for suffix, predicted in (
            ("", [kept[i] for i in range(len(frames))]),
            ("_zero_shot", plan.zero_shot_predictions[name]),
        ):
            structures.write_predictions(
                folder / PREDICTIONS / f"{name}{suffix}.xyz",
                frames.structures,
                predicted,
            )
    together = metrics.merged(sums for sums, _ in shares)
    groups = together.errors_by_config_type()
    return together.errors() | ({"by_config_type": groups} if groups else {})


def _data(plan: Plan) -> dict[str, Any]:
    """Return what the frames of each part hold."""
    parts = {"train": plan.train, "valid": plan.valid, "test": plan.test}
    return {
        name: {
            "n_structures": len(frames),
            "n_atoms": int(frames.survey.n_atoms.sum()),
            "elements": list(frames.survey.elements),
            "labels": {k: n for k, n in frames.survey.counts.items() if n},
            "label_keys": dict(frames.survey.label_keys),
        }
        for name, frames in parts.items()
        if frames
    }


def _retention(plan: Plan, saved: DeltaFile, folder: Path) -> dict[str, Any] | None:
    """Return what the model has forgotten, and whether it is safe to run."""
    if plan.config.retention == "none":
        return None
    held_out = plan.test or plan.valid
    weights = saved.merged(plan.backend.stored_weights())
    curves = robustness.short_range(plan.backend, weights, plan.train.survey)
    files.write_json(folder / SHORT_RANGE, curves)
    return robustness.measure(
        plan.backend,
        weights,
        size=plan.config.retention,
        train=plan.train.survey,
        held_out=held_out.structures,
        sizes=held_out.survey.n_atoms,
    )


def _magnetism(plan: Plan) -> dict[str, Any]:
    """Return ``spin``: the layer's settings, and what was made of the labels."""
    if plan.config.spin is None:
        return {}
    scale = dataclasses.asdict(plan.scale) if plan.scale else {}
    return {
        "spin": {
            **plan.config.spin.model_dump(mode="json"),
            "magforces_scale": plan.config.magforces_scale,
            **({"magforces_scale_fit": scale} if scale else {}),
        }
    }


def _metadata(
    plan: Plan, saved: DeltaFile, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the delta file says of itself: no time, host or path."""
    backend, config = plan.backend, plan.config
    records = {w.name: w.describe() for w in backend.path_weights()}
    return {
        "backend": backend.name,
        "model": backend.model_name,
        "head": backend.head,
        "method": {"name": config.method, "config": config.method_options},
        "select": config.select,
        "properties": sorted(plan.properties),
        "seed": config.seed,
        "base": fingerprint(backend.stored_weights()),
        "tensors": {name: records[name] for name in saved.changes},
        "elements": sorted(plan.train.survey.elements),
        "reference_energies": config.reference_energies,
        "level_of_theory": config.level_of_theory,
        "data": {
            "train": plan.train.survey.fingerprint,
            "n_train": len(plan.train),
            "n_replay": len(plan.replay.frames) if plan.replay else 0,
        },
        "metrics": {k: results[k] for k in ("zero_shot", "valid", "test")},
        "sparsity": results["sparsity"],
        "versions": versions("pathtune", "torch", backend.vendor, "e3nn"),
        "licence": licence(backend.model_name) or "that of the foundation model",
    } | (
        {
            "spin": config.spin.model_dump(mode="json"),
            "magforces_scale": config.magforces_scale,
        }
        if config.spin
        else {}
    )


def evaluate(
    data: str | Sequence[Structure],
    model: str | Backend,
    delta: str | Path | DeltaFile | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    keys: Mapping[Property, str] | None = None,
    orderings: str | None = None,
    batch_size: int = 16,
    accelerator: str | None = None,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Predict structures with base (+ delta) and return the errors.

    Parameters
    ----------
    data
        ASE-readable file, or structures. Labels are optional.
    model
        Name, checkpoint or loaded backend.
    delta
        Delta file.
    output
        Extended XYZ file for the predictions.
    overwrite
        Replace an existing output.
    keys
        Label keys, where they are not the usual ones.
    orderings
        What the magnetic orderings of one structure share, see
        `pathtune.orderings.groups`.
    batch_size
        Structures in one call of the model.
    accelerator
        Predict with the vendor's calculator and these kernels; see `calculator`.
    console
        Where progress is shown.
    **options
        For `load`: dtype, device, head, trust_checkpoint.

    Returns
    -------
    dict
        As ``test`` in ``metrics.json``; ``orderings`` where there are magnetic
        orderings of one structure, see `pathtune.orderings.compare`.
    """
    if output is not None and Path(output).exists() and not overwrite:
        raise UsageError(f"{output} exists; add --overwrite to replace it")
    if not isinstance(data, Sequence) or isinstance(data, str):
        data = structures.read(data, keys=keys, allow_unlabelled=True)
    backend, delta = load_with_delta(model, delta, **options)
    require_elements(backend, structures.survey(data).elements)
    structures.require_cells(data)
    if isinstance(backend, SpinBackend):
        scale = delta.metadata.get("magforces_scale", 1.0) if delta else 1.0
        data = structures.magnetised(data, scale)
    weights = delta.apply(backend.stored_weights()) if delta else {}
    shifts = delta.shifts if delta else {}
    if console and any(shifts.values()):
        for symbol in unshifted(data, shifts):
            console.print(
                f"warning: the delta has no reference-energy shift for {symbol}; "
                "energies of frames with it are off"
            )

    sums = metrics.Sums()
    energies: list[float] = []
    fast = accelerator and acceleration.calculator(
        backend, weights, shifts, accelerator
    )

    def predicted() -> Iterator[Prediction]:
        for start in track(
            range(0, len(data), batch_size),
            description="evaluating",
            console=console or Console(stderr=True, markup=False),
            transient=True,
            disable=console is None,
        ):
            chunk = data[start : start + batch_size]
            if fast:
                predictions = list(acceleration.predictions(fast, chunk))
            else:
                predictions = predict(
                    backend,
                    chunk,
                    weights=weights,
                    shifts=shifts,
                    batch_size=len(chunk),
                )
            sums.add(chunk, predictions)
            energies.extend(float(p["energy"]) for p in predictions)
            yield from predictions

    if output is None:
        for _ in predicted():
            pass
    else:
        structures.write_predictions(output, data, predicted())
    groups = sums.errors_by_config_type()
    # Not a further pass through a file that does not fit in memory, unless asked for.
    is_wanted = orderings is not None or isinstance(data, list)
    compared = compare_orderings(data, energies, orderings) if is_wanted else None
    return (
        sums.errors()
        | ({"by_config_type": groups} if groups else {})
        | ({"orderings": compared} if compared else {})
    )


def relax_spins(
    atoms: Atoms,
    model: str | Backend,
    delta: str | Path | DeltaFile | None = None,
    *,
    magnitudes: Literal["fixed", "free"] = "fixed",
    n_starts: int = 8,
    seed: int = 0,
    **options: Any,
) -> RelaxedSpins:
    """Find the spins of lowest energy at fixed positions.

    Parameters
    ----------
    atoms
        With initial magnetic moments; not modified.
    model, delta
        Base and delta with a spin layer, by name or path.
    magnitudes, n_starts, seed
        See `pathtune.spin.relax.relax_spins`.
    **options
        For `load`: dtype, device, head, trust_checkpoint.

    Raises
    ------
    UsageError
        If the delta has no spin layer, or no atom has a spin.

    Returns
    -------
    RelaxedSpins
        Its energies are those of the calculator, reference-energy shifts included.
    """
    backend, loaded = load_with_delta(model, delta, **options)
    if not isinstance(backend, SpinBackend):
        raise UsageError(
            "relaxing spins needs a spin layer: give the delta of a run with --spin"
        )
    weights = loaded.apply(backend.stored_weights()) if loaded else {}
    found = spin_relaxation(
        backend, weights, atoms, magnitudes=magnitudes, n_starts=n_starts, seed=seed
    )
    shifts = loaded.shifts if loaded else {}
    shift = sum(shifts.get(symbol, 0.0) for symbol in atoms.symbols)
    return dataclasses.replace(
        found,
        energy=found.energy + shift,
        energies=tuple(energy + shift for energy in found.energies),
    )


def calculator(
    model: str | Backend,
    delta: str | Path | DeltaFile | None = None,
    *,
    accelerator: str | None = None,
    **options: Any,
) -> Calculator:
    """Return the vendor's ASE calculator for base (+ delta).

    Parameters
    ----------
    model, delta
        Base and delta, by name or path.
    accelerator
        The vendor's accelerated kernels, e.g. ``cueq``; the converted model is compared
        with the plain one and refused where it differs.
    **options
        For `load`: dtype, device, head, trust_checkpoint.
    """
    backend, delta = load_with_delta(model, delta, **options)
    weights = delta.apply(backend.stored_weights()) if delta else {}
    shifts = delta.shifts if delta else {}
    return acceleration.calculator(backend, weights, shifts, accelerator)
