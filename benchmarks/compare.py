"""Compare methods under one protocol: run what is missing, make the tables.

    python benchmarks/compare.py fill DATA [EXPERIMENT ...]
    python benchmarks/compare.py tables [EXPERIMENT ...]

An experiment is a file in ``experiments/``; ``defaults.yaml`` holds what all have in
common. Each run is one call of the command line and one file below ``results/``,
written once and never edited; runs whose result exists are left alone, interrupted ones
are resumed. Every method is run with the first seed at each learning rate of its grid,
and with the other seeds at the one of the lowest force error on the validation frames.
DATA is the folder of the data sets; see README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import protocols
import vendors
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCORE = "forces_mae_mev_per_angstrom"


@dataclass(frozen=True)
class Run:
    """One call of ``pathtune finetune``."""

    experiment: str
    name: str
    model: str
    settings: Mapping[str, Any]

    @property
    def result(self) -> Path:
        """Where it is recorded."""
        return HERE / "results" / self.experiment / f"{self.name}.json"

    @property
    def base(self) -> str:
        """The model as the trainers take it; a file of this repository by its path."""
        path = ROOT / self.model
        return str(path) if path.is_file() else self.model

    def do(self, folder: Path) -> None:
        """Run or resume, and record."""
        log = folder / f"{self.name}.log"
        record: dict[str, Any] = {"experiment": self.experiment, "status": "done"}
        with log.open("a") as out:
            try:
                record |= self._vendor(folder, out) or self._pathtune(folder, out)
                score = f"valid F {record['metrics']['valid'][SCORE]:.2f}"
            except subprocess.CalledProcessError as error:
                record["status"] = f"exit {error.returncode}"
                score = f"failed, see {log}"
        text = json.dumps(record, indent=2).replace(f"{folder}/", "")
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.result.write_text(text.replace(f"{ROOT}/", "") + "\n")
        print(f"{self.experiment} {self.name}: {score}", flush=True)

    def _vendor(self, folder: Path, log: TextIO) -> dict[str, Any]:
        """Run a vendor's trainer, where the method is one."""
        if "vendor" not in self.settings:
            return {}
        train = getattr(vendors, self.settings["vendor"])
        return train(folder, folder / self.name, self.base, self.settings, log)

    def _pathtune(self, folder: Path, log: TextIO) -> dict[str, Any]:
        run = folder / self.name
        command = ["finetune", "--model", self.base]
        if self.base != self.model:
            command += ["--trust-checkpoint"]
        for part in ("train", "valid", "test"):
            command += [f"--{part}", str(folder / f"{part}.xyz")]
        for key, value in self.settings.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        command += ["--output", str(run)]
        line = [sys.executable, "-m", "pathtune", *command, "--resume"]
        subprocess.run(line, stdout=log, stderr=log, check=True)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {
            "command": shlex.join(["pathtune", *command]),
            "curve": [[line["step"], line["valid"][SCORE]] for line in lines],
            "config": yaml.safe_load((run / "config.yaml").read_text()),
            "environment": json.loads((run / "environment.json").read_text()),
            "metrics": json.loads((run / "metrics.json").read_text()),
        }


@dataclass(frozen=True)
class Experiment:
    """A protocol, a model, and the methods to compare on them."""

    name: str
    protocol: str
    model: str
    backend: str
    seeds: Sequence[int]
    settings: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    #: The experiment that chooses the learning rates; None for this one.
    rates_from: str | None = None

    @classmethod
    def read(cls, name: str) -> Experiment:
        """Read ``experiments/<name>.yaml`` over the defaults."""
        path = HERE / "experiments" / f"{name}.yaml"
        defaults = yaml.safe_load((HERE / "defaults.yaml").read_text())
        given = yaml.safe_load(path.read_text())
        methods = given.get("methods") or list(defaults["methods"])
        if isinstance(methods, str):
            methods = cls.read(methods).methods
        elif isinstance(methods, list):
            methods = {m: defaults["methods"][m] for m in methods}
        settings = {**defaults["settings"], **given.get("settings", {})}
        seeds = given.get("seeds", defaults["seeds"])
        named = {k: given[k] for k in ("protocol", "model", "backend")}
        named["rates_from"] = given.get("rates_from")
        return cls(name, seeds=seeds, settings=settings, methods=methods, **named)

    def run(self, method: str, lr: float | None, seed: int) -> Run:
        """Return one run."""
        own = {k: v for k, v in self.methods[method].items() if k != "lr"}
        if lr is not None:
            own["lr"] = lr
        name = method + (f"-lr{lr:g}" if lr is not None else "") + f"-seed{seed}"
        settings = {**self.settings, **own, "seed": seed}
        return Run(self.name, name, self.model, settings)

    def rates(self, method: str) -> list[float | None]:
        """Return the grid of learning rates; [None] is the method's own."""
        given = self.methods[method].get("lr")
        return given if isinstance(given, list) else [given]

    def first(self) -> Iterator[Run]:
        """Return the runs that choose the learning rates."""
        if self.rates_from is not None:
            return
        for method in self.methods:
            for lr in self.rates(method):
                yield self.run(method, lr, self.seeds[0])

    def best_rate(self, method: str) -> float | None:
        """Return the learning rate of the lowest validation error with the first seed.

        Raises
        ------
        LookupError
            If none of the first runs has succeeded.
        """
        if self.rates_from is not None:
            return Experiment.read(self.rates_from).best_rate(method)
        scores = {}
        for lr in self.rates(method):
            record = read(self.run(method, lr, self.seeds[0]))
            if record is not None:
                scores[lr] = record["metrics"]["valid"][SCORE]
        if not scores:
            raise LookupError(f"{self.name}: no run of {method} has succeeded")
        return min(scores, key=scores.__getitem__)

    def others(self) -> Iterator[Run]:
        """Return the other runs, at the chosen rates."""
        for method in self.methods:
            try:
                lr = self.best_rate(method)
            except LookupError as error:
                print(error)
                continue
            for seed in self.seeds[self.rates_from is None :]:
                yield self.run(method, lr, seed)


def read(run: Run) -> dict[str, Any] | None:
    """Return the record of a run that succeeded."""
    if not run.result.exists():
        return None
    record = json.loads(run.result.read_text())
    return record if record["status"] == "done" else None


def fill(names: Sequence[str], data: Path, runs: Path, jobs: int) -> None:
    """Do the runs that have no result yet."""
    from pathtune import discovery

    experiments = []
    for experiment in map(Experiment.read, names):
        backend = discovery.load("backends", experiment.backend).Backend
        if backend.is_installed():
            protocols.write(experiment.protocol, data, runs / experiment.name)
            experiments.append(experiment)
        else:
            print(f"{experiment.name}: left out, {backend.vendor} is not installed")
    with ThreadPoolExecutor(jobs) as pool:
        for stage in (Experiment.first, Experiment.others):
            missing = [
                r for e in experiments for r in stage(e) if not r.result.exists()
            ]
            list(pool.map(lambda r: r.do(runs / r.experiment), missing))


def _retained(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the drift from the base; vendors' trainers do not measure it."""
    return metrics.get("retention") or {}


COLUMNS = {
    "E (meV/atom)": lambda m: m["test"].get("energy_mae_mev_per_atom"),
    "F (meV/Å)": lambda m: m["test"].get("forces_mae_mev_per_angstrom"),
    "S (meV/Å^3)": lambda m: m["test"].get("stress_mae_mev_per_angstrom3"),
    "M (μ_B)": lambda m: m["test"].get("magmom_vector_mae_mu_b"),
    "angle (°)": lambda m: m["test"].get("magmom_angle_mae_degrees"),
    "H (meV/μ_B)": lambda m: m["test"].get("magforces_mae_mev_per_mu_b"),
    "updated (%)": lambda m: (
        100 * (1 - m["sparsity"]["total_sparsity"]) if "sparsity" in m else None
    ),
    "drift E (meV/atom)": lambda m: _retained(m).get("energy_drift_mev_per_atom"),
    "drift F (meV/Å)": lambda m: _retained(m).get("forces_drift_mev_per_angstrom"),
    "new holes": lambda m: (
        len(_retained(m)["dimers"]["new_holes"]) if "dimers" in _retained(m) else None
    ),
    "NVE drift (meV/atom/ps)": lambda m: (_retained(m).get("nve") or {}).get(
        "energy_drift_mev_per_atom_per_ps"
    ),
    "s/step": lambda m: m["timing"].get("seconds_per_step"),
    "memory (MiB)": lambda m: m["timing"].get("peak_memory_mib"),
}
# The first columns are errors, which the model has before it is trained too.
N_ERRORS = 6


def table(experiment: Experiment) -> str:
    """Return a Markdown table of test errors: mean ± standard deviation over seeds."""
    rows = []
    zero = None
    for method in experiment.methods:
        try:
            lr = experiment.best_rate(method)
        except LookupError:
            continue
        records = [read(experiment.run(method, lr, s)) for s in experiment.seeds]
        metrics = [r["metrics"] for r in records if r is not None]
        if not metrics:
            continue
        zero = zero or {**metrics[0], "test": metrics[0]["zero_shot"]}
        used = lr or records[0]["config"]["lr"]
        cells = [_spread([f(m) for m in metrics]) for f in COLUMNS.values()]
        rows.append([method, f"{used:g}" if used else "", str(len(metrics)), *cells])
    if zero is None:
        return f"### {experiment.name}\n\nno results yet\n"
    cells = [_spread([f(zero)]) for f in list(COLUMNS.values())[:N_ERRORS]]
    rows.insert(0, ["zero-shot", "", "", *cells, *[""] * (len(COLUMNS) - N_ERRORS)])
    titles = ["method", "lr", "seeds", *COLUMNS]
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    lines = [[titles[i] for i in used], ["---"] * len(used)]
    lines += [[row[i] for i in used] for row in rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    about = f"{experiment.model}, {experiment.protocol}, "
    about += f"{experiment.settings['max_steps']} steps"
    return f"### {experiment.name}\n\n{about}\n\n{body}\n"


def _spread(values: Sequence[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    digits = 1 if mean >= 100 else 2 if mean >= 0.1 else 3
    text = f"{mean:.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.{digits}f}"
    return text


def main() -> None:
    every = sorted(p.stem for p in (HERE / "experiments").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("fill", help="do the runs that have no result yet")
    filling.add_argument("data", type=Path)
    filling.add_argument("--runs", type=Path, default=Path("runs"))
    filling.add_argument("--jobs", type=int, default=1)
    showing = commands.add_parser("tables", help="print tables of the results")
    for command in (filling, showing):
        command.add_argument("experiments", nargs="*", choices=[*every, []])
    given = parser.parse_args()
    names = given.experiments or every
    if given.command == "fill":
        fill(names, given.data.resolve(), given.runs.resolve(), given.jobs)
    else:
        print("\n".join(table(Experiment.read(name)) for name in names), end="")


if __name__ == "__main__":
    main()
