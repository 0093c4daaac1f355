"""The plan of a run: data read and checked, model loaded, delta built."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pathtune import delta as deltas
from pathtune import discovery, metrics, replay, structures
from pathtune.backends.base import Backend, require_elements
from pathtune.config import RunConfig, validate
from pathtune.deltafile import fingerprint
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.loading import load
from pathtune.prediction import predict, unshifted, with_shifts
from pathtune.properties import (
    PARTIAL,
    PROPERTIES,
    Prediction,
    Property,
    Structure,
)
from pathtune.spin import fit as spin_fit
from pathtune.spin.backend import SpinBackend
from pathtune.structures import ReferenceEnergies, Survey, reference_energies
from pathtune.training import compiled, distributed, memory, optimizer
from pathtune.training.data import (
    Batch,
    Frames,
    Order,
    Source,
    batches_by_step,
    default_workers,
)
from pathtune.training.log import require_loggers
from pathtune.training.loop import backward, training_step

DEFAULT_STEPS = 2000
EVALUATIONS = 20
_NO_NUMBER_DEPENDS_ON = (
    *("output", "train", "valid", "test", "model", "loggers"),
    *("memory_limit", "stream_above", "workers", "replay_file", "retention"),
)
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
    replay: Source | None
    zero_shot: Mapping[str, Any]
    zero_shot_raw: Mapping[str, Any]
    #: Name of a part -> what the base predicts of it, reference energies re-estimated;
    #: parts that stay in their file are left out.
    zero_shot_predictions: Mapping[str, Sequence[Prediction]]
    identity: str
    #: What a training step runs, for people.
    step: str
    #: What the labels of magnetic forces were multiplied with, where it was fitted.
    scale: structures.Scale | None = None

    @property
    def sources(self) -> list[Source]:
        """What every step takes a batch from: the data first, then the replay."""
        data = Source(self.train, self.properties)
        return [data, self.replay] if self.replay else [data]


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
        device=distributed.device(config.device),
        head=config.head,
        trust_checkpoint=config.trust_checkpoint,
    )
    if config.tf32 and (backend.device.type, config.dtype) != ("cuda", "float32"):
        raise UsageError(
            f"--tf32 is for float32 on an NVIDIA GPU; this run is {config.dtype} on "
            f"{backend.device}"
        )
    parts = _read_parts(config, console)
    layer, scale = {}, None
    if config.spin is not None:
        with_layer = SpinBackend(backend, config.spin, config.seed)
        backend, layer = with_layer, with_layer.spin_parameters()
        config, scale = _fit_magforces(config, parts["train"])
        parts = _magnetised(config, parts, console)
    surveys = {name: structures.survey(part) for name, part in parts.items()}
    for name, part in parts.items():
        require_elements(backend, surveys[name].elements)
        structures.require_cells(part)
    properties = _trained_properties(config, backend, surveys, console)
    workers = default_workers() if config.workers is None else config.workers
    frames = {
        name: Frames.prepare(
            backend,
            part,
            workers=workers,
            count_edges=config.max_edges_per_batch is not None,
        )
        for name, part in parts.items()
    }
    base = {"train": _predict_base(frames["train"], config, {})}
    _check("train", frames, base["train"], console)
    references = _reference_energies(config, backend, parts["train"], base["train"])
    if references.warning:
        console.print(f"note: {references.warning}", highlight=False)
    _check_shifts(references, backend, parts, console)
    # Re-estimated whatever was chosen, so that an offset does not count as a gain.
    fair = _reference_energies(
        config.model_copy(update={"reference_energies": "estimated"}),
        backend,
        parts["train"],
        base["train"],
    )
    for name in [name for name in parts if name != "train"]:
        base[name] = _predict_base(frames[name], config, fair.shifts)
        _check(name, frames, base[name], console)
    frames = {name: f.with_shifts(references.shifts) for name, f in frames.items()}
    if isinstance(backend, SpinBackend) and backend.config.fit:
        layer = spin_fit.fit(backend, frames["train"], properties, console)
    delta = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=method,
        config=method_config,
        selection=config.select or method_config.select,
        elements=list(surveys["train"].elements),
        head=backend.head,
        seed=config.seed,
        properties=list(properties),
        layer=layer,
        layer_options=config.spin.model_dump(include={"lr", "weight_decay"})
        if config.spin
        else None,
    )
    replayed = replay.draw(config, backend)
    source = replay.label(replayed, config, backend, console) if replayed else None
    step = "plain"
    if config.compile:
        # No more than a step takes: the plain model needs more memory than training.
        most = min(4, config.batch_size or _default_batch(len(frames["train"])))
        telling = np.flatnonzero(~surveys["train"].is_lone_atom).tolist()
        rows = telling or list(range(len(frames["train"])))
        sample = frames["train"].part(frames["train"].passes(rows, config, most)[0])
        graphs, learned = [*sample.graphs], {*properties}
        if source is not None:
            graphs += source.frames.part([0]).graphs
            learned |= source.properties.keys()
        step = compiled.enable(backend, delta, graphs, learned)
    resolved = _resolve(config, method_config, frames["train"], delta, properties)
    judged = "test" if "test" in parts else "valid"
    return Plan(
        config=resolved,
        backend=backend,
        delta=delta,
        train=frames["train"],
        valid=frames["valid"],
        test=frames.get("test"),
        references=references,
        properties=properties,
        replay=source,
        zero_shot=base[judged].shifted.errors(),
        zero_shot_raw=base[judged].raw.errors(),
        zero_shot_predictions={
            name: with_shifts(parts[name], base[name].complete, fair.shifts)
            for name in ("valid", "test")
            if name in parts and frames[name].ready is not None
        },
        identity=_identity(resolved, backend, surveys, references, replayed),
        step=step,
        scale=scale,
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


def _read_parts(config: RunConfig, console: Console) -> dict[str, Sequence[Structure]]:
    """Read the files; set validation frames aside where none are given."""

    def read(path: str) -> Sequence[Structure]:
        return structures.read(
            path, keys=config.label_keys, stream_above=config.stream_above
        )

    parts = {"train": read(config.train)}
    survey = structures.survey(parts["train"])
    lone = np.flatnonzero(survey.is_lone_atom).tolist()
    if lone:
        console.print(f"note: {len(lone)} isolated atoms are trained on like any frame")
    for name, path in (("valid", config.valid), ("test", config.test)):
        if path is None:
            continue
        parts[name] = read(path)
        used, others = survey.label_keys, structures.survey(parts[name]).label_keys
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
        rest = np.flatnonzero(~survey.is_lone_atom).tolist()
        kept, held = structures.split_validation(
            rest, config.valid_fraction, seed=config.seed
        )
        whole = parts["train"]
        parts["train"] = structures.take(whole, [*lone, *kept])
        parts["valid"] = structures.take(whole, held)
        sources = ", ".join(map(str, held[:10])) + (", ..." if len(held) > 10 else "")
        console.print(
            f"validation: {len(held)} of the training frames set aside, indices "
            f"{sources}",
            highlight=False,
        )
    return parts


def _fit_magforces(
    config: RunConfig, train: Sequence[Structure]
) -> tuple[RunConfig, structures.Scale | None]:
    """Put a number where the scale of the magnetic forces is to be fitted."""
    if config.magforces_scale != "fit":
        return config, None
    found = structures.fit_scale(train)
    return config.model_copy(update={"magforces_scale": found.factor}), found


def _magnetised(
    config: RunConfig, parts: Mapping[str, Sequence[Structure]], console: Console
) -> dict[str, Sequence[Structure]]:
    """Make moments the input of the model; say which frames have none."""
    assert config.spin and config.magforces_scale != "fit"
    if config.spin.spins != "none":
        for name, part in parts.items():
            if without := structures.unmagnetised(part):
                console.print(
                    f"warning: {len(without)} of {len(part)} {name} frames (first "
                    f"{without[0]}) have neither moments nor initial moments; to the "
                    "spin layer they are not magnetic at all",
                    highlight=False,
                )
    scale = config.magforces_scale
    return {name: structures.magnetised(part, scale) for name, part in parts.items()}


def _trained_properties(
    config: RunConfig,
    backend: Backend,
    surveys: Mapping[str, Survey],
    console: Console,
) -> dict[Property, float]:
    """Return what has labels, a loss weight and a prediction; at least one."""
    counts = _weighted_labels(surveys["train"])
    for name in PROPERTIES:
        if counts[name] and name not in backend.properties:
            console.print(
                f"note: {backend.model_name} does not predict {name}; these labels are "
                "not trained" + (" without --spin" if name in PARTIAL else "")
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
    judged_by = _weighted_labels(surveys["valid"])
    if not any(judged_by[name] for name in properties):
        raise PathtuneError(
            f"the validation frames have none of the labels that are trained: they "
            f"have {_listing(judged_by)}, trained are {', '.join(properties)}; give "
            "other frames with --valid"
        )
    return properties


def _weighted_labels(survey: Survey) -> dict[Property, int]:
    """Count the labels whose weight is above zero."""
    return {name: int((survey.rows(name) > 0).sum()) for name in PROPERTIES}


@dataclass(frozen=True, eq=False)
class _Base:
    """What the base model says of some frames.

    Parameters
    ----------
    energies
        (n_structures,) eV.
    predictions
        Of the frames whose units are looked at; empty for the others.
    complete
        Of all frames, where these are in memory; empty otherwise.
    raw, shifted
        Errors of the model as it is, and with its reference energies shifted.
    """

    energies: np.ndarray
    predictions: Sequence[Prediction]
    complete: Sequence[Prediction]
    raw: metrics.Sums
    shifted: metrics.Sums


def _predict_base(
    frames: Frames, config: RunConfig, shifts: Mapping[str, float]
) -> _Base:
    """Predict all frames once; every process its share."""
    n = len(frames)
    if config.max_edges_per_batch == "auto":
        # Not measured yet; but each structure has to fit.
        largest = int(frames.n_edges.max())
        config = config.model_copy(update={"max_edges_per_batch": largest})
    passes = frames.passes(range(n), config, config.batch_size or _default_batch(n))
    wanted = set(structures.sample(n))
    energies = np.zeros(n)
    kept: dict[int, Prediction] = {}
    raw, shifted = metrics.Sums(), metrics.Sums()
    for part, predictions in frames.predictions(passes):
        energies[part.rows] = [float(p["energy"]) for p in predictions]
        kept |= {
            i: p
            for i, p in zip(part.rows, predictions, strict=True)
            if i in wanted or frames.ready is not None
        }
        raw.add(part.structures, predictions)
        shifted.add(part.structures, with_shifts(part.structures, predictions, shifts))
    shares = distributed.gather((energies, kept, raw, shifted))
    columns = list(zip(*shares, strict=True))
    for other in columns[1]:
        kept |= other
    return _Base(
        energies=sum(columns[0]),
        predictions=[kept[i] if i in wanted else {} for i in range(n)],
        complete=[kept[i] for i in range(n)] if frames.ready is not None else [],
        raw=metrics.merged(columns[2]),
        shifted=metrics.merged(columns[3]),
    )


def _check(
    name: str, frames: Mapping[str, Frames], base: _Base, console: Console
) -> None:
    """Check all frames of a part; print warnings, raise on errors.

    A test frame among the training frames is an error; a validation frame there only
    makes the choice of the best iterate optimistic.
    """
    report = structures.check(
        frames[name].structures,
        predictions=base.predictions,
        against=None if name == "train" else frames["train"].structures,
    )
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


def _default_batch(n: int) -> int:
    return max(1, min(64, n // 10))


def _resolve(
    config: RunConfig,
    method_config: Any,
    frames: Frames,
    delta: deltas.Delta,
    properties: Mapping[Property, float],
) -> RunConfig:
    """Fill in what depends on the data, the method and the memory."""
    n = len(frames)
    batch_size = config.batch_size and min(config.batch_size, n)
    if batch_size is None and not config.is_bounded:
        batch_size = _default_batch(n)
    if config.max_epochs is not None and config.max_steps is not None:
        raise UsageError("give --max-steps or --max-epochs, not both")
    resolved = config.model_copy(
        update={
            "method_options": method_config.model_dump(mode="json"),
            "lr": getattr(method_config, "lr", None),
            "select": config.select or method_config.select,
            "batch_size": batch_size,
            "device": str(frames.backend.device),
        }
    )
    if config.max_edges_per_batch == "auto":
        edges = _most_edges(resolved, frames, delta, properties)
        resolved = resolved.model_copy(update={"max_edges_per_batch": edges})
    steps = config.max_steps or DEFAULT_STEPS
    if config.max_epochs is not None:
        steps = Order(frames, resolved).steps(config.max_epochs)
    return resolved.model_copy(
        update={
            "max_steps": steps,
            "max_epochs": None,
            "eval_every": config.eval_every or max(1, steps // EVALUATIONS),
        }
    )


def _most_edges(
    config: RunConfig,
    frames: Frames,
    delta: deltas.Delta,
    properties: Mapping[Property, float],
) -> int:
    """Measure how many edges fit in memory on every device of the run."""
    parameters = optimizer.parameters(optimizer.build(delta.param_groups(), 1))
    most = int(np.sort(frames.n_edges)[::-1][: config.batch_size].sum())
    if not parameters:
        return most

    def compute(rows: list[int]) -> None:
        batch = Batch(Source(frames, properties), rows, [frames.part(rows)])
        backward(delta, parameters, batch, config)
        delta.zero_grad()

    device = frames.backend.device
    found = memory.most_edges(
        compute,
        frames.n_edges,
        most=most,
        device=device,
        limit=memory.limit_mib(device, config.memory_limit),
    )
    return -distributed.largest(-found)


def _reference_energies(
    config: RunConfig,
    backend: Backend,
    train: Sequence[Structure],
    base: _Base,
) -> ReferenceEnergies:
    """Return the shifts of the reference energies by the chosen way."""
    mode = config.reference_energies
    survey = structures.survey(train)
    if mode == "foundation" or not survey.counts["energy"]:
        return reference_energies.foundation(train)
    if mode == "estimated":
        return reference_energies.estimate(train, base.energies)
    if mode == "average":
        return reference_energies.average(train, backend.reference_energies())
    symbols = sorted(survey.elements)
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
    surveys: Mapping[str, Survey],
    references: ReferenceEnergies,
    replayed: Sequence[Structure],
) -> str:
    """Return a digest of all that a run's numbers depend on."""
    settings = config.model_dump(mode="json")
    for free in _NO_NUMBER_DEPENDS_ON:
        del settings[free]
    if config.batch_size is not None:
        # They only cut a sum into other parts.
        del settings["max_atoms_per_batch"], settings["max_edges_per_batch"]
    settings["device"] = backend.device.type
    content = {
        "settings": settings,
        "base": fingerprint(backend.stored_weights()),
        "data": {name: survey.fingerprint for name, survey in surveys.items()},
        "weights": {
            name: [
                hashlib.sha256(survey.weights[p].tobytes()).hexdigest()
                for p in PROPERTIES
            ]
            for name, survey in surveys.items()
        },
        "shifts": dict(references.shifts),
        "replay": structures.survey(replayed).fingerprint,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def print_plan(plan: Plan, console: Console) -> None:
    """Say what will be trained on what, and how good the base is."""
    config, backend = plan.config, plan.backend
    say = console.print
    sizes = [f"{len(plan.train)} train", f"{len(plan.valid)} valid"]
    if plan.test:
        sizes.append(f"{len(plan.test)} test")
    survey = plan.train.survey
    keys = ", ".join(survey.label_keys.values())
    say(f"data: {', '.join(sizes)} frames; {_listing(survey.counts)}; keys {keys}")
    if plan.train.ready is None:
        say(
            f"data: {config.train} is not kept in memory; read by "
            f"{plan.train.workers or 'no'} worker processes"
        )
    shifts = ", ".join(f"{e} {v:+.4f}" for e, v in plan.references.shifts.items())
    say(f"reference energies ({config.reference_energies}), shift in eV: {shifts}")
    say(f"zero-shot MAE, raw:     {', '.join(metrics.summary(plan.zero_shot_raw))}")
    say(f"zero-shot MAE, shifted: {', '.join(metrics.summary(plan.zero_shot))}")
    percent = 100 * plan.delta.alive / backend.total_parameters
    change = plan.delta.change
    say(
        f"model: {backend.model_name} ({backend.name}), {backend.total_parameters} "
        f"parameters; selection {config.select!r}: {plan.delta.alive} of them "
        f"({percent:.1f} %)"
    )
    options = ", ".join(f"{k} {v}" for k, v in config.method_options.items())
    say(
        f"method: {config.method} ({options or 'no options'}), {change.trainable} "
        "trainable numbers"
    )
    if config.spin is not None:
        say(_spin_layer(plan), highlight=False)
    if not plan.delta.trainable:
        say("training: none")
        return
    say(
        f"training: {config.max_steps} steps, batch {_batch(plan)}, seed "
        f"{config.seed}, {'tf32' if config.tf32 else config.dtype} on "
        f"{_devices(backend)}"
    )
    say(f"training step: {plan.step}", highlight=False)


def _spin_layer(plan: Plan) -> str:
    """Return the size of the layer, and what it makes of the labels."""
    spin, new = plan.config.spin, plan.delta.new
    assert spin
    percent = 100 * new / (plan.backend.total_parameters - new)
    inputs = {
        "moments": "moments are its input, their error is that of its own refinement",
        "directions": "directions of the moments are its input",
        "none": "nothing of the moments is its input",
    }
    coupling = "with" if spin.spin_orbit else "without"
    parts = [
        f"spin layer: {new} parameters ({percent:.1f} % of the base), {coupling} "
        f"spin-orbit coupling; {inputs[spin.spins]}"
    ]
    if spin.fit and spin.spins != "none":
        parts.append("its couplings by distance start from least squares")
    if plan.scale is not None:
        fitted = plan.scale
        parts.append(
            f"labels of magnetic forces times {fitted.factor:.4f} ± "
            f"{fitted.error:.4f}, fitted on {fitted.n_pairs} pairs of training frames"
        )
    elif plan.config.magforces_scale != 1:
        parts.append(f"labels of magnetic forces times {plan.config.magforces_scale}")
    return "; ".join(parts)


def _batch(plan: Plan) -> str:
    """Return what a step and a pass through the model are made of."""
    config = plan.config
    given = {"atoms": config.max_atoms_per_batch, "edges": config.max_edges_per_batch}
    bounds = [f"{bound} {what}" for what, bound in given.items() if bound is not None]
    if config.batch_size is None:
        return f"up to {' and '.join(bounds)}"
    parts = f" in parts of up to {' and '.join(bounds)}" if bounds else ""
    return f"{config.batch_size}{parts}"


def _devices(backend: Backend) -> str:
    n = distributed.size()
    return f"{backend.device}" if n == 1 else f"{n} processes ({backend.device.type})"


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
    with distributed.session():
        return _dry_run(config, distributed.only_main(console), probe_steps)


def _dry_run(config: RunConfig, console: Console, probe_steps: int) -> dict[str, Any]:
    plan = prepare(config, console)
    print_plan(plan, console)
    resolved = plan.config
    assert resolved.max_steps
    probed = range(probe_steps + 1 if plan.delta.trainable else 0)
    supply = batches_by_step(plan.sources, resolved, probed)
    opt = optimizer.build(plan.delta.param_groups(), 1)
    seconds = []
    for _ in probed:
        start = time.perf_counter()
        training_step(plan.delta, opt, next(supply), resolved)
        seconds.append(time.perf_counter() - start)
    per_step = float(np.median(seconds[1:] or 0.0))
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
