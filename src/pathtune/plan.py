"""The plan of a run: data read and checked, model loaded, delta built."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pathtune import delta as deltas
from pathtune import discovery, metrics, structures
from pathtune.backends.base import Backend, require_elements
from pathtune.config import RunConfig, validate
from pathtune.deltafile import fingerprint
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.loading import load
from pathtune.prediction import predict, unshifted, with_shifts
from pathtune.properties import PROPERTIES, Prediction, Property, Structure
from pathtune.structures import ReferenceEnergies, reference_energies
from pathtune.training import memory, optimizer
from pathtune.training.data import Frames, batch_indices
from pathtune.training.log import require_loggers
from pathtune.training.loop import training_step

DEFAULT_STEPS = 2000
EVALUATIONS = 20
REFERENCE_ENERGIES = ("estimated", "foundation", "isolated", "average")


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


def prepare(config: RunConfig, console: Console) -> Plan:
    """Read and check the data, load the model, fit reference energies, build the delta.

    Raises
    ------
    UsageError, PathtuneError
        As `finetune`.
    """
    method, method_config = _method(config)
    require_loggers(config.loggers)
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
        structures.require_cells(part)
    properties = _trained_properties(config, backend, parts, console)
    resolved = _resolve(config, method_config, len(parts["train"]), backend)
    assert resolved.batch_size
    assert resolved.select
    graphs = {name: [backend.graph(s.atoms) for s in p] for name, p in parts.items()}
    base = {
        name: predict(
            backend, part, graphs=graphs[name], batch_size=resolved.batch_size
        )
        for name, part in parts.items()
    }
    _check(parts, base, console)
    references = _reference_energies(config, backend, parts["train"], base["train"])
    if references.warning:
        console.print(f"note: {references.warning}", highlight=False)
    _check_shifts(references, backend, parts, console)
    delta = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=method,
        config=method_config,
        selection=resolved.select,
        elements=sorted({e for s in parts["train"] for e in s.atoms.symbols}),
        head=backend.head,
        seed=config.seed,
        properties=list(properties),
    )
    frames = {
        name: Frames.prepare(backend, part, graphs[name], references.shifts)
        for name, part in parts.items()
    }
    judged = "test" if "test" in parts else "valid"
    # Re-estimated whatever was chosen, so that an offset does not count as a gain.
    fair = _reference_energies(
        config.model_copy(update={"reference_energies": "estimated"}),
        backend,
        parts["train"],
        base["train"],
    )
    shifted = with_shifts(parts[judged], base[judged], fair.shifts)
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
        identity=_identity(resolved, backend, parts, references),
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


def _read_parts(
    config: RunConfig, console: Console
) -> dict[str, Sequence[Structure]]:
    """Read the files; set validation frames aside where none are given."""
    keys = config.label_keys
    parts: dict[str, Sequence[Structure]] = {
        "train": structures.read(config.train, keys=keys)
    }
    lone = [s for s in parts["train"] if structures.is_lone_atom(s)]
    if lone:
        console.print(f"note: {len(lone)} isolated atoms are trained on like any frame")
    for name, path in (("valid", config.valid), ("test", config.test)):
        if path is not None:
            parts[name] = structures.read(path, keys=keys)
    for name in ("valid", "test"):
        used, others = _label_keys(parts["train"]), _label_keys(parts.get(name, ()))
        for label in used.keys() & others.keys():
            if used[label] != others[label]:
                console.print(
                    f"warning: {label} is {used[label]!r} in the training frames and "
                    f"{others[label]!r} in the {name} frames; if these are two levels "
                    f"of theory, name one key with --{label}-key",
                    highlight=False,
                )
    if "valid" not in parts:
        # Isolated atoms define reference energies; they stay with the training.
        rest = [s for s in parts["train"] if not structures.is_lone_atom(s)]
        kept, parts["valid"] = structures.split_validation(
            rest, config.valid_fraction, seed=config.seed
        )
        parts["train"] = [*lone, *kept]
        sources = ", ".join(s.source.rpartition(":")[2] for s in parts["valid"][:10])
        more = ", ..." if len(parts["valid"]) > 10 else ""
        console.print(
            f"validation: {len(parts['valid'])} of the training frames set aside, "
            f"indices {sources}{more}",
            highlight=False,
        )
    return parts


def _label_keys(part: Sequence[Structure]) -> dict[Property, str]:
    """Return the key each label of a file was found under."""
    return {name: key for s in part for name, key in s.label_keys.items()}


def _trained_properties(
    config: RunConfig,
    backend: Backend,
    parts: Mapping[str, Sequence[Structure]],
    console: Console,
) -> dict[Property, float]:
    """Return what has labels, a loss weight and a prediction; at least one."""
    counts = _weighted_labels(parts["train"])
    for name in PROPERTIES:
        if counts[name] and name not in backend.properties:
            console.print(
                f"note: {backend.model_name} does not predict {name}; these labels are "
                "not trained"
            )
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
    judged_by = _weighted_labels(parts["valid"])
    if not any(judged_by[name] for name in properties):
        raise PathtuneError(
            f"the validation frames have none of the labels that are trained: they "
            f"have {_listing(judged_by)}, trained are {', '.join(properties)}; give "
            "other frames with --valid"
        )
    return properties


def _weighted_labels(part: Sequence[Structure]) -> dict[Property, int]:
    """Count the labels whose weight is above zero."""
    return {
        name: sum(name in s.labels and s.term_weight(name) > 0 for s in part)
        for name in PROPERTIES
    }


def _check(
    parts: Mapping[str, Sequence[Structure]],
    predictions: Mapping[str, Sequence[Prediction]],
    console: Console,
) -> None:
    """Check all frames; print warnings, raise on errors.

    A test frame among the training frames is an error; a validation frame there only
    makes the choice of the best iterate optimistic.
    """
    for name, part in parts.items():
        against = None if name == "train" else parts["train"]
        report = structures.check(part, predictions=predictions[name], against=against)
        prefix = "" if name == "train" else f"{name} frames: "
        for finding in report.findings:
            excused = finding.code == "leakage" and name == "valid"
            if finding.severity == "error" and not excused:
                raise PathtuneError(f"{prefix}{finding.message}")
            if finding.severity != "note":
                console.print(f"warning: {prefix}{finding.message}", highlight=False)


def _check_shifts(
    references: ReferenceEnergies,
    backend: Backend,
    parts: Mapping[str, Sequence[Structure]],
    console: Console,
) -> None:
    """Refuse shifts the model cannot hold; warn where frames lack one."""
    if not any(references.shifts.values()):
        return
    if not backend.has_shift_by_element:
        raise PathtuneError(
            f"{backend.model_name} has one reference energy for all elements and "
            "cannot hold shifts by element; use --reference-energies foundation"
        )
    for name, part in parts.items():
        if missing := unshifted(part, references.shifts):
            console.print(
                f"warning: {name} frames: no training frame has {', '.join(missing)}, "
                "so their reference energies keep the base model's level of theory and "
                "the energies of these frames are off",
                highlight=False,
            )


def _resolve(
    config: RunConfig, method_config: Any, n_train: int, backend: Backend
) -> RunConfig:
    """Fill in what depends on the data and the method."""
    batch_size = min(config.batch_size or max(1, min(64, n_train // 10)), n_train)
    steps = config.max_steps or DEFAULT_STEPS
    if config.max_epochs is not None:
        if config.max_steps is not None:
            raise UsageError("give --max-steps or --max-epochs, not both")
        steps = math.ceil(config.max_epochs * n_train / batch_size)
    return config.model_copy(
        update={
            "method_options": method_config.model_dump(mode="json"),
            "lr": method_config.lr,
            "select": config.select or method_config.select,
            "batch_size": batch_size,
            "max_steps": steps,
            "max_epochs": None,
            "eval_every": config.eval_every or max(1, steps // EVALUATIONS),
            "device": str(backend.device),
        }
    )


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
    config: RunConfig,
    backend: Backend,
    parts: Mapping[str, Sequence[Structure]],
    references: ReferenceEnergies,
) -> str:
    """Return a digest of all that a run's numbers depend on."""
    settings = config.model_dump(mode="json")
    for free in ("output", "train", "valid", "test", "model", "loggers"):
        del settings[free]
    content = {
        "settings": settings,
        "base": fingerprint(backend.stored_weights()),
        "data": {name: structures.fingerprint(part) for name, part in parts.items()},
        "weights": {
            name: [[s.term_weight(p) for p in PROPERTIES] for s in part]
            for name, part in parts.items()
        },
        "shifts": dict(references.shifts),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def print_plan(plan: Plan, console: Console) -> None:
    """Say what will be trained on what, and how good the base is."""
    config, backend = plan.config, plan.backend
    say = console.print
    sizes = [
        f"{len(plan.train.structures)} train",
        f"{len(plan.valid.structures)} valid",
    ]
    if plan.test:
        sizes.append(f"{len(plan.test.structures)} test")
    counts = structures.label_counts(plan.train.structures)
    keys = ", ".join(_label_keys(plan.train.structures).values())
    say(f"data: {', '.join(sizes)} frames; {_listing(counts)}; keys {keys}")
    shifts = ", ".join(f"{e} {v:+.4f}" for e, v in plan.references.shifts.items())
    say(f"reference energies ({config.reference_energies}), shift in eV: {shifts}")
    say(f"zero-shot MAE, raw:     {', '.join(metrics.summary(plan.zero_shot_raw))}")
    say(f"zero-shot MAE, shifted: {', '.join(metrics.summary(plan.zero_shot))}")
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
    console = console or Console(stderr=True, markup=False)
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
            plan.backend,
            plan.delta,
            opt,
            plan.train,
            indices,
            resolved,
            plan.properties,
        )
        seconds.append(time.perf_counter() - start)
    per_step = sorted(seconds[1:])[probe_steps // 2]
    result: dict[str, Any] = {
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
        f"{per_step * resolved.max_steps / 60:.0f} min in all, "
        f"{result['peak_memory_mib']:.0f} MiB"
    )
    return result
