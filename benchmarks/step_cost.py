"""Compare the cost of a training step: sparse against full, allocator on and off.

    python benchmarks/step_cost.py DATA.xyz

Times are paired in one process: the two methods take turns, step by step, and the
ratio of each pair is reported as median and quartiles. Memory is the peak of a process
of its own for each method. DATA is any labelled file; its first frames make the batch.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pathtune import delta as deltas
from pathtune import discovery, structures
from pathtune.config import RunConfig
from pathtune.loading import load
from pathtune.provenance import environment
from pathtune.training import memory, optimizer
from pathtune.training.data import Batch, Frames, Source
from pathtune.training.loop import training_step

HERE = Path(__file__).parent
PROPERTIES = {"energy": 1.0, "forces": 10.0}


def steps(
    data: str, model: str, methods: list[str], batch: int
) -> list[Callable[[], float]]:
    """Return a function for each method that does one step on the same batch."""
    backend = load(model, device="cpu")
    frames = structures.read(data)[:batch]
    prepared = Frames.prepare(backend, list(frames))
    rows = list(range(len(frames)))
    taken = [Batch(Source(prepared, PROPERTIES), rows, [prepared.part(rows)])]
    config = RunConfig(model=model, train=data, batch_size=batch)
    functions = []
    for name in methods:
        method = discovery.load("methods", name)
        delta = deltas.build(
            backend.path_weights(),
            dict(backend.model.named_parameters()),
            method=method,
            config=method.Config(),
            selection=method.Config.select,
            elements=sorted({e for s in frames for e in s.atoms.symbols}),
            head=None,
            seed=0,
        )
        opt = optimizer.build(delta.change.param_groups(), 10)
        functions.append(
            lambda delta=delta, opt=opt: training_step(delta, opt, taken, config)
        )
    return functions


def timed(function: Callable[[], float]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def child(given: argparse.Namespace, method: str, allocator: bool) -> dict[str, float]:
    """Measure one method in a process of its own."""
    command = [sys.executable, __file__, given.data, "--child", method]
    command += ["--pairs", str(given.pairs)] + ([] if allocator else ["--plain"])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", default="7net-0")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--child")
    parser.add_argument("--plain", action="store_true", help="leave the allocator")
    given = parser.parse_args()
    if not given.plain:
        memory.keep_freed_memory()
    if given.child:
        (step,) = steps(given.data, given.model, [given.child], given.batch)
        seconds = [timed(step) for _ in range(given.pairs)][3:]
        peak = memory.peak_mib(torch.device("cpu"))
        print(json.dumps({"seconds": float(np.median(seconds)), "peak_mib": peak}))
        return

    # First, while this process is small: a child's peak starts at its parent's size.
    alone = {
        f"{method}{'' if allocator else ', default allocator'}": child(
            given, method, allocator
        )
        for method, allocator in (("sparse", True), ("full", True), ("sparse", False))
    }
    sparse, full = steps(given.data, given.model, ["sparse", "full"], given.batch)
    pairs = [(timed(sparse), timed(full)) for _ in range(given.pairs)][3:]
    ratios = np.array([a / b for a, b in pairs])
    results = {
        "command": f"python benchmarks/step_cost.py {Path(given.data).name} "
        f"--batch {given.batch} --pairs {given.pairs}",
        "environment": environment() | {"machine": platform.machine()},
        "seconds_sparse": float(np.median([a for a, _ in pairs])),
        "seconds_full": float(np.median([b for _, b in pairs])),
        "ratio_quartiles": np.percentile(ratios, [25, 50, 75]).tolist(),
        "memory_ratio": alone["sparse"]["peak_mib"] / alone["full"]["peak_mib"],
        "processes": alone,
    }
    name = f"step-cost-{given.model}.json"
    (HERE / "results" / name).write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
