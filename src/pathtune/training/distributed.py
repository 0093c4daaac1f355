"""One run in several processes: who this process is, and what all agree on.

The processes are started by ``torchrun`` or by SLURM's ``srun``. Each has the whole
model and the whole optimizer, and works on its share of every batch. Gradients are
summed in one call once a step's backward passes are done: the trained tensors get
theirs at the very end of the last one, so there is nothing that wrapping them in
PyTorch's DistributedDataParallel could overlap, and the sum (not the mean) over
processes is what keeps the loss that of the whole batch.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from pathtune.errors import PathtuneError

T = TypeVar("T")

_store: dist.Store | None = None

# A process that has not answered for so long is taken for dead. One that dies closes
# its connections, which the others notice at once.
TIMEOUT = datetime.timedelta(hours=1)


def _from_slurm() -> None:
    """Name the processes of an ``srun`` step as ``torchrun`` would.

    A batch script is itself no step: a command in it without ``srun`` runs alone.
    """
    given = os.environ
    if "WORLD_SIZE" in given or int(given.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    nodes = re.split(r",(?![^\[]*\])", given["SLURM_STEP_NODELIST"])
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes[0])
    local = given.get("SLURM_STEP_TASKS_PER_NODE", given["SLURM_STEP_NUM_TASKS"])
    os.environ |= {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", local)[0],
        "MASTER_ADDR": given.get("MASTER_ADDR", first),
        "MASTER_PORT": given.get(
            "MASTER_PORT", str(20000 + int(given["SLURM_JOB_ID"]) % 10000)
        ),
    }


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Connect the processes of a run; nothing where there is one."""
    _from_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        yield
        return
    global _store
    # Objects and CPU tensors go through gloo, gradients on GPUs through NCCL.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _peers():
        _store, number, n = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            backend, store=_store, rank=number, world_size=n, timeout=TIMEOUT
        )
    yield
    # Only after success: a process that failed must not wait for the others.
    dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process; the one with 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def device(given: str) -> str:
    """Return the device of this process: each process of a machine has its own GPU."""
    on_gpu = given.startswith("cuda") or (given == "auto" and torch.cuda.is_available())
    if size() == 1 or not on_gpu:
        return given
    number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def only_main(console: Console) -> Console:
    """Return the console; a silent one in the other processes."""
    return console if rank() == 0 else Console(quiet=True)


def sum_gradients(parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Replace gradients and loss by their sums over all processes, in one call."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # this process had no frame of the batch
            parameter.grad = torch.zeros_like(parameter)
    tensors = [loss, *(p.grad for p in parameters if p.grad is not None)]
    together = torch.cat([t.flatten() for t in tensors])
    with _peers():
        dist.all_reduce(together)
    parts = together.split([t.numel() for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def gather(value: T) -> list[T]:
    """Return what each process has."""
    if size() == 1:
        return [value]
    values: list[T] = [value] * size()
    with _peers():
        dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """Return the largest value that a process has."""
    if size() == 1:
        return value
    found = torch.tensor(value)
    with _peers():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_main(make: Callable[[], T]) -> T:
    """Return what process 0 makes; the others wait for it."""
    if size() == 1:
        return make()
    value = [make() if rank() == 0 else None]
    with _peers():
        dist.broadcast_object_list(value, src=0)
    return value[0]  # type: ignore[return-value]


def speaks_first() -> bool:
    """Whether this process is the first to fail: only that one says why."""
    if _store is None:
        return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
    try:
        return _store.add("pathtune/failed", 1) == 1
    except RuntimeError:  # the process that keeps the count is gone
        return True


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PathtuneError(
            f"process {rank()} of {size()} lost another process of the run, which says "
            "above why it ended, or was killed; go on with --resume"
        ) from error
