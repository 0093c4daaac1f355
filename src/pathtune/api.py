"""The verbs: load, finetune, evaluate, merge, calculator; the command line calls them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pathtune import delta as deltas
from pathtune import discovery, files, metrics, structures, trust
from pathtune.backends.base import DTYPES, Backend, ModelInfo, require_elements
from pathtune.config import RunConfig, read_yaml, validate
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.prediction import predict
from pathtune.properties import Prediction, Property, Structure
from pathtune.structures import ReferenceEnergies, reference_energies
from pathtune.training import memory, optimizer
from pathtune.training.data import Frames, batch_indices
from pathtune.training.loop import train, training_step

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

DELTA, CONFIG, METRICS = "delta.safetensors", "config.yaml", "metrics.json"
ENVIRONMENT = "environment.json"
DEFAULT_STEPS = 2000
EVALUATIONS = 20
REFERENCE_ENERGIES = ("estimated", "foundation", "isolated", "average")


def models() -> list[ModelInfo]:
    """List the released models of every backend; imports no vendor."""
    found = (discovery.load("backends", name) for name in discovery.names("backends"))
    return [info for module in found for info in module.Backend.models()]


def load(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    head: str | None = None,
    trust_checkpoint: bool = False,
) -> Backend:
    """Load a foundation model by its released name, or a checkpoint by its path.

    Parameters
    ----------
    model
        E.g. ``7net-0`` (see `models`) or a file.
    dtype
        ``float32`` or ``float64``.
    device
        ``cpu``, ``cuda``, ``cuda:1``, ...; ``auto`` takes a GPU where there is one.
    head
        Head (modality) of a model that has several.
    trust_checkpoint
        Open a pickled file of unknown hash.

    Raises
    ------
    UsageError
        If name, dtype, device or head do not exist.
    PathtuneError
        If the vendor is not installed or the file cannot be used.
    """
    if dtype not in DTYPES:
        raise UsageError(unknown("dtype", dtype, DTYPES))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used: {reason}") from error
    backend = _backend_of(model)
    if not backend.is_installed():
        raise PathtuneError(
            f"{model} needs {backend.vendor}: pip install 'pathtune[{backend.name}]'"
        )
    return backend.load(
        model,
        dtype=DTYPES[dtype],
        device=device,
        head=head,
        trust_checkpoint=trust_checkpoint,
    )


def _backend_of(model: str) -> type[Backend]:
    """Return the family a released name or a checkpoint's suffix belongs to."""
    backends = [
        discovery.load("backends", name).Backend for name in discovery.names("backends")
    ]
    known = {info.name: b for b in backends for info in b.models()}
    for backend in backends:
        if backend.knows(model):
            return backend
    path = Path(model)
    if path.exists():
        for backend in backends:
            if path.suffix in backend.suffixes:
                return backend
        suffixes = ", ".join(s for b in backends for s in b.suffixes)
        raise UsageError(
            f"{model}: the suffix {path.suffix!r} belongs to no backend ({suffixes})"
        )
    raise UsageError(f"{unknown('model', model, known)} Or give a checkpoint file")


# Fine-tuning


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a run needs, prepared; `finetune` trains it, a dry run prints it."""

    config: RunConfig
    backend: Backend
    delta: deltas.Delta
    train: Frames
    valid: Frames
    test: Frames | None
    references: ReferenceEnergies
    properties: Mapping[Property, float]
    zero_shot: Mapping[str, Any]
    zero_shot_raw: Mapping[str, Any]
    identity: str


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
    console = console or Console(stderr=True)
    folder = Path(config.output)
    if resume and (folder / METRICS).exists():
        console.print(f"{folder} is finished; nothing to do")
        return dict(json.loads((folder / METRICS).read_text(encoding="utf-8")))
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and is not empty: choose another --output, or continue "
            f"it with --resume --output {folder}"
        )
    plan = prepare(config, console)
    files.write_text(folder / CONFIG, plan.config.to_yaml())
    files.write_json(folder / ENVIRONMENT, environment())
    print_plan(plan, console)
    outcome = train(
        plan.backend,
        plan.delta,
        plan.train,
        plan.valid,
        plan.config,
        properties=plan.properties,
        folder=folder,
        console=console,
        identity=plan.identity,
    )
    backend, frames = plan.backend, plan.test or plan.valid
    changes = plan.delta.changes(backend.stored_weights())
    saved = DeltaFile(changes, plan.references.shifts, {})
    results: dict[str, Any] = {
        "zero_shot": plan.zero_shot,
        "zero_shot_raw": plan.zero_shot_raw,
        "valid": _evaluated(plan, saved, plan.valid),
        "test": _evaluated(plan, saved, frames) if plan.test else None,
        "sparsity": deltas.sparsity(
            saved.updated_parameters, plan.delta.alive, backend.total_parameters
        ),
        "best_step": outcome.best_step,
        "steps": outcome.steps,
    }
    saved = dataclasses.replace(saved, metadata=_metadata(plan, saved, results))
    saved.save(folder / DELTA)
    results["timing"] = {
        "seconds_per_step": outcome.seconds_per_step,
        "seconds_total": outcome.seconds_total,
        "peak_memory_mib": memory.peak_mib(backend.device),
    }
    files.write_json(folder / METRICS, results)
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
    for key, value in given.items():
        if key != "output" and key in dumped and dumped[key] != value:
            raise UsageError(
                f"{folder} was started with {key} = {dumped[key]!r}, not {value!r}; "
                "resume without it, or choose another --output"
            )
    return stored.model_copy(update={"output": str(folder)})


def prepare(config: RunConfig, console: Console) -> Plan:
    """Read and check the data, load the model, fit reference energies, build the delta.

    Raises
    ------
    UsageError, PathtuneError
        As `finetune`.
    """
    method, method_config = _method(config)
    memory.keep_freed_memory()
    backend = load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        head=config.head,
        trust_checkpoint=config.trust_checkpoint,
    )
    parts = _read_parts(config, console)
    for part in parts.values():
        require_elements(backend, {e for s in part for e in s.atoms.symbols})
    counts = structures.label_counts(parts["train"])
    properties: dict[Property, float] = {
        name: weight
        for name, weight in config.loss_weights.items()
        if weight > 0 and counts[name] and name in backend.properties
    }
    if not properties:
        raise PathtuneError(
            "nothing to learn: the training frames have no label whose loss weight is "
            f"above zero (found: {_listing(counts)})"
        )
    graphs = {name: [backend.graph(s.atoms) for s in p] for name, p in parts.items()}
    base = {
        name: predict(backend, part, graphs=graphs[name])
        for name, part in parts.items()
    }
    report = structures.check(
        parts["train"], elements=None, predictions=base["train"], against=None
    )
    for other in ("valid", "test"):
        if other in parts:
            leaks = structures.check(parts["train"], against=parts[other]).findings
            _complain(
                [f for f in leaks if f.code == "leakage"], console, f"{other} frames: "
            )
    _complain(report.findings, console)
    references = _reference_energies(config, backend, parts["train"], base["train"])
    if references.warning:
        console.print(f"note: {references.warning}", highlight=False)
    n = len(parts["train"])
    batch_size = config.batch_size or max(1, min(64, n // 10))
    steps = config.max_steps
    if config.max_epochs is not None:
        if steps is not None:
            raise UsageError("give --max-steps or --max-epochs, not both")
        steps = math.ceil(config.max_epochs * n / batch_size)
    steps = steps or DEFAULT_STEPS
    resolved = config.model_copy(
        update={
            "method_options": method_config.model_dump(mode="json"),
            "lr": method_config.lr,
            "select": config.select or method_config.select,
            "batch_size": min(batch_size, n),
            "max_steps": steps,
            "max_epochs": None,
            "eval_every": config.eval_every or max(1, steps // EVALUATIONS),
            "device": str(backend.device),
        }
    )
    delta = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=method,
        config=method_config,
        selection=resolved.select or "all",
        elements=sorted({e for s in parts["train"] for e in s.atoms.symbols}),
        head=backend.head,
        seed=config.seed,
    )
    frames = {
        name: Frames.prepare(backend, part, graphs[name], references.shifts)
        for name, part in parts.items()
    }
    judged = "test" if "test" in parts else "valid"
    shifted = predict(
        backend, parts[judged], graphs=graphs[judged], shifts=references.shifts
    )
    return Plan(
        config=resolved,
        backend=backend,
        delta=delta,
        train=frames["train"],
        valid=frames["valid"],
        test=frames.get("test"),
        references=references,
        properties=properties,
        zero_shot=metrics.errors(parts[judged], shifted),
        zero_shot_raw=metrics.errors(parts[judged], base[judged]),
        identity=_identity(resolved, backend, parts),
    )


def _method(config: RunConfig) -> tuple[Any, Any]:
    """Return the method's module and its settings: preset, then options, then lr."""
    method = discovery.load("methods", config.method)
    preset = config.preset
    if preset is not None and preset not in method.PRESETS:
        raise UsageError(
            unknown(f"preset of method {config.method!r}", preset, method.PRESETS)
        )
    settings = dict(method.PRESETS[preset]) if preset else {}
    settings |= config.method_options
    if config.lr is not None:
        settings["lr"] = config.lr
    return method, validate(method.Config, settings, f"{config.method} option")


def _read_parts(config: RunConfig, console: Console) -> dict[str, list[Structure]]:
    """Read the files; set validation frames aside where none are given."""
    keys = config.label_keys
    parts = {"train": structures.read(config.train, keys=keys)}
    lone = [s for s in parts["train"] if s.config_type == "IsolatedAtom"]
    if lone and config.reference_energies != "isolated":
        console.print(f"note: {len(lone)} isolated atoms are trained on like any frame")
    for name, path in (("valid", config.valid), ("test", config.test)):
        if path is not None:
            parts[name] = structures.read(path, keys=keys)
    if "valid" not in parts:
        parts["train"], parts["valid"] = structures.split_validation(
            parts["train"], config.valid_fraction, seed=config.seed
        )
        sources = ", ".join(s.source.rpartition(":")[2] for s in parts["valid"][:10])
        more = ", ..." if len(parts["valid"]) > 10 else ""
        console.print(
            f"validation: {len(parts['valid'])} of the training frames set aside, "
            f"indices {sources}{more}",
            highlight=False,
        )
    return parts


def _complain(findings: Sequence[Any], console: Console, prefix: str = "") -> None:
    """Print warnings; raise on errors."""
    for finding in findings:
        if finding.severity == "error":
            raise PathtuneError(f"{prefix}{finding.message}")
        if finding.severity == "warning":
            console.print(f"warning: {prefix}{finding.message}", highlight=False)


def _reference_energies(
    config: RunConfig,
    backend: Backend,
    train: Sequence[Structure],
    base: Sequence[Prediction],
) -> ReferenceEnergies:
    """Return the shifts of the reference energies by the chosen way."""
    mode = config.reference_energies
    if mode == "foundation" or not any("energy" in s.labels for s in train):
        return reference_energies.foundation(train)
    if mode == "estimated":
        return reference_energies.estimate(train, [float(p["energy"]) for p in base])
    if mode == "average":
        return reference_energies.average(train, backend.reference_energies())
    symbols = sorted({e for s in train for e in s.atoms.symbols})
    if mode == "isolated":
        return reference_energies.isolated(train, lone_atoms(backend, symbols))
    if not Path(mode).exists():
        raise UsageError(
            f"{unknown('reference energies', mode, REFERENCE_ENERGIES)} Or give a JSON "
            "or YAML file of energies by element"
        )
    return reference_energies.from_file(mode, lone_atoms(backend, symbols))


def lone_atoms(backend: Backend, symbols: Sequence[str]) -> dict[str, float]:
    """Return the base model's energy (eV) of one atom alone, by element."""
    from ase import Atoms

    atoms = [Structure(Atoms(symbol)) for symbol in symbols]
    predicted = predict(backend, atoms, properties=["energy"], batch_size=1)
    energies = (float(p["energy"]) for p in predicted)
    return dict(zip(symbols, energies, strict=True))


def _identity(
    config: RunConfig, backend: Backend, parts: Mapping[str, Sequence[Structure]]
) -> str:
    """Return a digest of all that a run's numbers depend on."""
    settings = config.model_dump(mode="json")
    for free in ("output", "train", "valid", "test", "model", "loggers"):
        del settings[free]
    content = {
        "settings": settings,
        "base": fingerprint(backend.stored_weights()),
        "data": {name: structures.fingerprint(part) for name, part in parts.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _evaluated(plan: Plan, saved: DeltaFile, frames: Frames) -> dict[str, Any]:
    """Return errors of base + delta as any later user of the file will see them."""
    predictions = predict(
        plan.backend,
        frames.structures,
        graphs=frames.graphs,
        weights=saved.merged(plan.backend.stored_weights()),
        shifts=saved.shifts,
    )
    result = metrics.errors(frames.structures, predictions)
    groups = metrics.errors_by_config_type(frames.structures, predictions)
    return result | ({"by_config_type": groups} if groups else {})


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
        "seed": config.seed,
        "base": fingerprint(backend.stored_weights()),
        "tensors": {name: records[name] for name in saved.changes},
        "elements": sorted({e for s in plan.train.structures for e in s.atoms.symbols}),
        "reference_energies": config.reference_energies,
        "level_of_theory": config.level_of_theory,
        "data": {
            "train": structures.fingerprint(plan.train.structures),
            "n_train": len(plan.train.structures),
        },
        "metrics": {k: results[k] for k in ("zero_shot", "valid", "test")},
        "sparsity": results["sparsity"],
        "versions": versions("pathtune", "torch", backend.vendor, "e3nn"),
        "licence": "that of the foundation model",
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages; missing ones are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Return what a run's speed and rounding depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(
            "pathtune", "torch", "schedulefree", "ase", "numpy", "e3nn", "sevenn"
        ),
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Say what will be trained on what, and how good the base is."""
    config, backend = plan.config, plan.backend
    say = console.print
    sizes = [f"{len(plan.train.structures)} train", f"{len(plan.valid.structures)} valid"]
    if plan.test:
        sizes.append(f"{len(plan.test.structures)} test")
    say(f"data: {', '.join(sizes)} frames; {_listing(structures.label_counts(plan.train.structures))}")
    shifts = ", ".join(f"{e} {v:+.4f}" for e, v in plan.references.shifts.items())
    say(f"reference energies ({config.reference_energies}), shift in eV: {shifts}")
    say(f"zero-shot, raw:           {_errors_line(plan.zero_shot_raw)}")
    say(f"zero-shot, shifted:       {_errors_line(plan.zero_shot)}")
    percent = 100 * plan.delta.alive / backend.total_parameters
    say(
        f"model: {backend.model_name} ({backend.name}), {backend.total_parameters} "
        f"parameters; selection {config.select!r}: {plan.delta.alive} trainable "
        f"({percent:.1f} %)"
    )
    options = ", ".join(f"{k} {v}" for k, v in config.method_options.items())
    say(f"method: {config.method} ({options})")
    say(
        f"training: {config.max_steps} steps, batch {config.batch_size}, seed "
        f"{config.seed}, {config.dtype} on {backend.device}"
    )


def _errors_line(errors: Mapping[str, Any]) -> str:
    parts = []
    for key, unit in (
        ("energy_mae_mev_per_atom", "meV/atom"),
        ("forces_mae_mev_per_angstrom", "meV/Å"),
        ("stress_mae_mev_per_angstrom3", "meV/Å^3"),
    ):
        if key in errors:
            parts.append(f"{key.partition('_')[0]} MAE {errors[key]:.2f} {unit}")
    return ", ".join(parts)


def _listing(counts: Mapping[Property, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "no labels"


def dry_run(
    config: RunConfig, *, console: Console | None = None, probe_steps: int = 3
) -> dict[str, Any]:
    """Print the plan of a run with a measured time and memory; write nothing.

    Returns
    -------
    dict
        Counts, reference energies, zero-shot errors, ``seconds_per_step``,
        ``seconds_total`` (estimate) and ``peak_memory_mib``.
    """
    console = console or Console(stderr=True)
    plan = prepare(config, console)
    print_plan(plan, console)
    resolved = plan.config
    assert resolved.max_steps and resolved.batch_size
    opt = optimizer.build(plan.delta.change.param_groups(), 1)
    seconds = []
    for step in range(probe_steps + 1):
        start = time.perf_counter()
        indices = batch_indices(
            resolved.seed, step, resolved.batch_size, len(plan.train.structures)
        )
        training_step(
            plan.backend, plan.delta, opt, plan.train, indices, resolved, plan.properties
        )
        seconds.append(time.perf_counter() - start)
    per_step = sorted(seconds[1:])[probe_steps // 2]
    result = {
        "config": resolved.model_dump(mode="json"),
        "alive_parameters": plan.delta.alive,
        "total_parameters": plan.backend.total_parameters,
        "reference_energies": {
            "before": {
                e: plan.backend.reference_energies()[e] for e in plan.references.shifts
            },
            "shifts": dict(plan.references.shifts),
        },
        "zero_shot": plan.zero_shot,
        "zero_shot_raw": plan.zero_shot_raw,
        "seconds_per_step": per_step,
        "seconds_total": per_step * resolved.max_steps,
        "peak_memory_mib": memory.peak_mib(plan.backend.device),
    }
    console.print(
        f"probe: {per_step:.2f} s per step, about "
        f"{result['seconds_total'] / 60:.0f} min in all, "
        f"{result['peak_memory_mib']:.0f} MiB"
    )
    return result


# Using a delta


def _loaded(
    model: str | Backend, delta: str | Path | DeltaFile | None, **options: Any
) -> tuple[Backend, DeltaFile | None]:
    """Load what is given by name or path; a delta brings its head along."""
    if delta is not None and not isinstance(delta, DeltaFile):
        delta = DeltaFile.load(Path(delta))
    if isinstance(model, str):
        if delta is not None and options.get("head") is None:
            options["head"] = delta.metadata.get("head")
        model = load(model, **options)
    return model, delta


def evaluate(
    data: str | Sequence[Structure],
    model: str | Backend,
    delta: str | Path | DeltaFile | None = None,
    *,
    output: str | Path | None = None,
    keys: Mapping[Property, str] | None = None,
    batch_size: int = 16,
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
    keys
        Label keys, where they are not the usual ones.
    batch_size
        Structures in one call of the model.
    console
        Where progress is shown.
    **options
        For `load`: dtype, device, head, trust_checkpoint.

    Returns
    -------
    dict
        As ``test`` in ``metrics.json``.
    """
    if not isinstance(data, Sequence) or isinstance(data, str):
        data = structures.read(data, keys=keys, allow_unlabelled=True)
    backend, delta = _loaded(model, delta, **options)
    require_elements(backend, {e for s in data for e in s.atoms.symbols})
    weights = delta.apply(backend.stored_weights()) if delta else {}
    predictions: list[Prediction] = []
    chunks = range(0, len(data), batch_size)
    for start in track(
        chunks,
        description="evaluating",
        console=console or Console(stderr=True),
        transient=True,
        disable=console is None,
    ):
        predictions += predict(
            backend,
            data[start : start + batch_size],
            weights=weights,
            shifts=delta.shifts if delta else {},
            batch_size=batch_size,
        )
    if output is not None:
        structures.write_predictions(output, data, predictions)
    result = metrics.errors(data, predictions)
    groups = metrics.errors_by_config_type(data, predictions)
    return result | ({"by_config_type": groups} if groups else {})


def calculator(
    model: str | Backend,
    delta: str | Path | DeltaFile | None = None,
    **options: Any,
) -> Calculator:
    """Return the vendor's ASE calculator for base (+ delta)."""
    backend, delta = _loaded(model, delta, **options)
    if delta is None:
        return backend.calculator({}, {})
    return backend.calculator(delta.apply(backend.stored_weights()), delta.shifts)


def merge(
    model: str | Backend,
    delta: str | Path | DeltaFile,
    output: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write base + delta in the vendor's own format, verified before it is left there.

    The merged file is loaded again by the vendor's code and compared with base + delta
    on sample structures; a mismatch leaves no file.

    Parameters
    ----------
    model, delta
        Base and delta, by name or path.
    output
        File to write.
    overwrite
        Replace an existing file.
    console
        Where the verification is printed.
    **options
        For `load`.

    Returns
    -------
    dict
        ``energy_max_difference_ev_per_atom``, ``forces_max_difference_ev_per_angstrom``,
        ``stress_max_difference_ev_per_angstrom3`` and
        ``reference_energy_rounding_ev_per_atom``.

    Raises
    ------
    PathtuneError
        If the output exists, cannot be written, or the check fails.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; add --overwrite to replace it")
    backend, loaded = _loaded(model, delta, **options)
    assert loaded is not None
    if output.suffix not in backend.suffixes:
        raise UsageError(
            f"{output}: {backend.name} files end in {' or '.join(backend.suffixes)}"
        )
    weights = loaded.apply(backend.stored_weights())
    with files.replacing(output) as temporary:
        backend.save(temporary, weights, loaded.shifts)
        trust.remember(temporary)
        result = _verify(backend, weights, loaded.shifts, temporary)
    trust.remember(output)
    if console is not None:
        console.print(
            "verified: merged file = base + delta to "
            f"{result['energy_max_difference_ev_per_atom']:.1e} eV/atom, "
            f"{result['forces_max_difference_ev_per_angstrom']:.1e} eV/Å"
        )
        rounding = result["reference_energy_rounding_ev_per_atom"]
        line = f"reference energies are rounded by up to {rounding:.1e} eV/atom"
        console.print(f"warning: {line}" if rounding > 1e-4 else line)
    return result


def _verify(
    backend: Backend, weights: Mapping[str, Tensor], shifts: Mapping[str, float], path: Path
) -> dict[str, Any]:
    """Compare a written checkpoint with base + delta on sample structures."""
    samples = _samples(backend, sorted(shifts) or ["Cu"])
    merged = backend.reload(path)
    ours = predict(backend, samples, weights=weights, shifts=shifts)
    theirs = predict(merged, samples)
    worst = {"energy": 0.0, "forces": 0.0, "stress": 0.0}
    allowed_energy = 1e-5
    for structure, a, b in zip(samples, ours, theirs, strict=True):
        for name in worst:
            if name in a:
                scale = structure.n_atoms if name == "energy" else 1
                difference = float(abs(a[name] - b[name]).max()) / scale  # type: ignore[index]
                worst[name] = max(worst[name], difference)
        # The vendor sums in float32: four roundings of the total energy.
        rounding = 4 * abs(float(b["energy"])) * 2**-24 / structure.n_atoms
        allowed_energy = max(allowed_energy, 1e-5 + rounding)
    limits = {"energy": allowed_energy, "forces": 1e-5, "stress": 1e-5}
    for name, limit in limits.items():
        if not worst[name] <= limit:
            raise PathtuneError(
                f"the merged file does not reproduce base + delta: {name} differs by "
                f"{worst[name]:.1e} (allowed {limit:.1e}); nothing was written"
            )
    after = merged.reference_energies()
    before = backend.reference_energies()
    return {
        "energy_max_difference_ev_per_atom": worst["energy"],
        "forces_max_difference_ev_per_angstrom": worst["forces"],
        "stress_max_difference_ev_per_angstrom3": worst["stress"],
        "allowed_energy_difference_ev_per_atom": allowed_energy,
        "reference_energy_rounding_ev_per_atom": max(
            (abs(after[e] - before[e] - v) for e, v in shifts.items()), default=0.0
        ),
    }


def _samples(backend: Backend, symbols: Sequence[str]) -> list[Structure]:
    """Return small rattled crystals and clusters of the delta's elements."""
    from ase import Atoms

    samples = []
    for index, symbol in enumerate(symbols):
        other = symbols[(index + 1) % len(symbols)]
        length = 3.2
        positions = [[0, 0, 0], [1.5, 1.7, 1.6], [0.1, 1.6, 1.4]]
        atoms = Atoms([symbol, other, symbol], positions)
        samples.append(Structure(atoms, source=f"{symbol}-{other} cluster"))
        periodic = atoms.copy()
        periodic.set_cell([length, length + 0.1, length + 0.2])
        periodic.pbc = True
        periodic.rattle(0.05, seed=index)
        samples.append(Structure(periodic, source=f"{symbol}-{other} crystal"))
    return samples
