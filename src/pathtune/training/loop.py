"""The training loop: one function that reads from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathtune import metrics
from pathtune.config import RunConfig
from pathtune.delta import Delta, sparsity
from pathtune.errors import PathtuneError
from pathtune.properties import BY_ATOM, Prediction, Property
from pathtune.training import checkpoint, distributed, optimizer
from pathtune.training.data import (
    EVALUATED_AT_ONCE,
    Batch,
    Frames,
    Order,
    Source,
    batches_by_step,
)
from pathtune.training.interrupt import Interrupted, StopSignals
from pathtune.training.log import RunLog
from pathtune.training.loss import collate, labels_of, loss_terms


@dataclass(frozen=True)
class Outcome:
    """What a finished training leaves: the delta holds the best iterate.

    Parameters
    ----------
    best_step
        Step of the best validation loss.
    steps
        Steps done.
    seconds_per_step
        Median over this process's steps, evaluations excluded; over the whole run,
        evaluations included, where this process had none to do.
    seconds_total
        Over all processes of the run.
    """

    best_step: int
    steps: int
    seconds_per_step: float
    seconds_total: float


def backward(
    delta: Delta, parameters: Sequence[Tensor], batch: Batch, config: RunConfig
) -> Tensor:
    """Add the gradient of a batch's parts; return their share of its loss.

    Parameters
    ----------
    delta, parameters
        What is learned, and its tensors that are trained.
    batch
        Its parts are computed here, one after the other.
    config
        See `train`.
    """
    frames, properties = batch.source
    backend, labelled = frames.backend, frames.labelled(batch.rows, properties)
    total = torch.zeros((), device=backend.device, dtype=backend.dtype)
    for part in batch.parts:
        graph = backend.batch(part.graphs)
        labels = part.labels.to(backend.device, backend.dtype)
        predicted = backend.predict(graph, delta(), properties, training=True)
        terms = loss_terms(predicted, labels, config.huber_delta, labelled)
        loss = torch.stack([properties[name] * t for name, t in terms.items()]).sum()
        # Only towards what is trained: positions are leaves of the same graph.
        loss.backward(inputs=parameters)
        total += loss.detach()
    return total


def training_step(
    delta: Delta,
    opt: Any,
    batches: Sequence[Batch],
    config: RunConfig,
) -> float:
    """Do one step; return the sum of the losses of the whole batches.

    Raises
    ------
    PathtuneError
        If the loss or the gradient is not finite; the frames of the step are named.
    """
    parameters = optimizer.parameters(opt)
    opt.zero_grad()
    with _matrix_products(config.tf32):
        losses = [backward(delta, parameters, batch, config) for batch in batches]
    loss = torch.stack(losses).sum()
    distributed.sum_gradients(parameters, loss)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        where = ", ".join(
            b.source.frames.structures[i].source for b in batches for i in b.rows
        )
        raise PathtuneError(
            f"the loss became {loss.item()} (gradient norm {norm.item()}) in the batch "
            f"{where}; look at these frames, or lower --lr"
        )
    opt.step()
    return float(loss)


@contextlib.contextmanager
def _matrix_products(tf32: bool) -> Iterator[None]:
    """Multiply matrices in TF32, if asked to; leave PyTorch's setting as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def train(
    delta: Delta,
    sources: Sequence[Source],
    valid: Frames,
    config: RunConfig,
    *,
    folder: Path,
    console: Any,
    identity: str,
) -> Outcome:
    """Train a delta; on return it holds the best iterate by validation loss.

    Every process of a run does the same steps, each on its share of the batch; the
    first one decides which iterate is the best, and writes.

    Parameters
    ----------
    delta
        What is learned on top of the frozen model.
    sources
        What every step takes a batch from: the training frames first, then the replay.
    valid
        Validation frames.
    config
        Resolved settings.
    folder
        Run folder, for checkpoints and metrics.jsonl.
    console
        Where people read.
    identity
        Fingerprint of settings, model and data; a checkpoint of another one is
        refused.

    Raises
    ------
    PathtuneError
        If the loss is not finite, or a checkpoint belongs to other data.
    Interrupted
        After SIGINT or SIGTERM, with a checkpoint written.
    """
    steps, every = config.max_steps, config.eval_every
    assert steps and every, "the settings are resolved"
    is_main = distributed.rank() == 0
    frames, properties = sources[0]
    order = Order(frames, config)
    if not delta.trainable:
        steps = 0

    def new_optimizer() -> Any:
        warmup = config.warmup_fraction * delta.change.phase_share * steps
        return optimizer.build(
            delta.param_groups(), math.ceil(warmup), config.averaging_power
        )

    opt = new_optimizer()
    state: dict[str, Any] = {
        "step": 0,
        "best": {"loss": math.inf, "step": 0, "change": None},
        "stale": 0,
        "losses": [],
        "seconds": 0.0,
    }
    saved = distributed.from_main(lambda: checkpoint.read(folder))
    if saved is not None:
        if saved["identity"] != identity:
            raise PathtuneError(
                f"{folder} was started with other settings, another model or other "
                "data; resume with the same ones, or choose another --output"
            )
        delta.load_state_dict(saved["change"])
        opt = new_optimizer()
        opt.load_state_dict(saved["optimizer"])
        state = saved["state"]

    started = time.perf_counter() - state["seconds"]

    def save() -> None:
        state["seconds"] = time.perf_counter() - started
        content = {
            "identity": identity,
            "state": state,
            "change": delta.state_dict(),
            "optimizer": opt.state_dict(),
        }
        if is_main:
            checkpoint.write(folder, content)

    durations: list[float] = []
    pruned: set[str] = set()
    supply = batches_by_step(sources, config, range(state["step"], steps))
    with (
        RunLog(
            folder if is_main else None,
            console,
            total_steps=steps,
            start_step=state["step"],
            loggers=config.loggers,
        ) as log,
        StopSignals() as signals,
    ):
        evaluated = distributed.from_main(lambda: log.last_step)
        while True:
            step = state["step"]
            while delta.change.phase_due(step / max(1, steps)):
                # For good, not in `averaged`: the new phase starts from the average.
                opt.eval()
                delta.change.begin_phase()
                opt = new_optimizer()
                state["best"] = {"loss": math.inf, "step": step, "change": None}
                state["stale"] = 0
                log.say(f"step {step:>6}  a new phase of the method begins")
            if step > evaluated and (step % every == 0 or step == steps):
                with optimizer.averaged(opt):
                    record = evaluate(delta, valid, config, properties)
                    if not math.isfinite(record["valid_loss"]):
                        raise PathtuneError(
                            f"the validation loss became {record['valid_loss']} at "
                            f"step {step}; lower --lr, or look at the validation frames"
                        )
                    improved = record["valid_loss"] < state["best"]["loss"]
                    if improved:
                        state["best"] = {
                            "loss": record["valid_loss"],
                            "step": step,
                            "change": {
                                name: tensor.clone()
                                for name, tensor in delta.state_dict().items()
                            },
                        }
                state["stale"] = 0 if improved else state["stale"] + 1
                losses, state["losses"] = state["losses"], []
                record = {
                    "step": step,
                    "epoch": order.epoch(step),
                    "train_loss": sum(losses) / len(losses) if losses else None,
                    **record,
                    "best": improved,
                }
                log.evaluation(record)
                for name, layer in record["layers"].items():
                    is_pruned = "threshold" in layer and layer["updated"] == 0
                    if is_pruned and name not in pruned and step:
                        pruned.add(name)
                        log.say(
                            f"  note: {name} has pruned itself away; it stays at the "
                            "foundation model's weights unless its threshold falls"
                        )
                save()
            patient = not config.patience or state["stale"] < config.patience
            if step == steps or not (patient or delta.change.phase_pending):
                break
            if (received := distributed.largest(signals.received or 0)) > 0:
                save()
                raise Interrupted(
                    received,
                    f"stopped at step {step} of {steps}; go on with: "
                    f"pathtune finetune --resume --output {folder}",
                )
            start = time.perf_counter()
            loss = training_step(delta, opt, next(supply), config)
            durations.append(time.perf_counter() - start)
            state["losses"].append(loss)
            state["step"] = step + 1
            log.advance(loss)
    delta.load_state_dict(state["best"]["change"])
    ordered = sorted(durations) or [state["seconds"] / max(1, state["step"])]
    return Outcome(
        best_step=state["best"]["step"],
        steps=state["step"],
        seconds_per_step=ordered[len(ordered) // 2],
        seconds_total=state["seconds"],
    )


def evaluate(
    delta: Delta,
    frames: Frames,
    config: RunConfig,
    properties: Mapping[Property, float],
) -> dict[str, Any]:
    """Return validation loss, errors, sparsity and the state of every layer."""
    backend = frames.backend
    with torch.no_grad():
        weights = delta()
    passes = frames.passes(
        range(len(frames)), config, config.batch_size or EVALUATED_AT_ONCE
    )
    labelled = frames.labelled(slice(None), properties)
    sums, loss = metrics.Sums(), 0.0
    for part, predictions in frames.predictions(
        passes, weights=weights, shifts=frames.shifts, properties=properties
    ):
        sums.add(part.structures, predictions)
        labels = collate([labels_of(s, {}) for s in part.structures])
        predicted = _stack(predictions, properties)
        terms = loss_terms(predicted, labels, config.huber_delta, labelled)
        loss += sum(properties[name] * float(term) for name, term in terms.items())
    shares = distributed.gather((loss, sums))
    changes = delta.changes(backend.stored_weights())
    thresholds = delta.change.thresholds()
    layers: dict[str, dict[str, Any]] = {}
    for target in delta.targets:
        name = target.weight.name
        updated = len(changes[name].indices) if name in changes else 0
        layers[name] = {"updated": updated, "alive": target.size}
        if name in thresholds:
            layers[name]["threshold"] = thresholds[name]
    updated = sum(layer["updated"] for layer in layers.values()) + delta.new
    return {
        "valid_loss": sum(loss for loss, _ in shares),
        "valid": metrics.merged(sums for _, sums in shares).errors(),
        "sparsity": sparsity(updated, delta.alive, backend.total_parameters, delta.new),
        "layers": layers,
    }


def _stack(
    predictions: Sequence[Prediction], properties: Collection[Property]
) -> dict[Property, Tensor]:
    """Concatenate predictions; a structure without stress gets zeros (weight 0)."""
    absent = np.zeros(6)
    stacked: dict[Property, Tensor] = {}
    for name in properties:
        rows = [torch.as_tensor(p.get(name, absent)) for p in predictions]
        stacked[name] = torch.cat(rows) if name in BY_ATOM else torch.stack(rows)
    return stacked
