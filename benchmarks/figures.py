"""Draw the comparisons, from the results alone.

    python benchmarks/figures.py docs/images

The name of an experiment tells what is drawn: methods on SevenNet-0 (error on the test
frames against what was forgotten), the size of the support (``-budget``), the decay of
the threshold (``-decay``) or selections (``-selection``); experiments without results
are left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from compare import COLUMNS, HERE, SCORE, Experiment, read

OFF_THE_SCALE = {"frozen", "scratch"}
DEFAULT_PERCENT = 3.0
SELECTIONS = {"decay": "all", "linear": "linear", "fctp": "fctp"}
SUPPORTS = {
    "gradual": "gradual",
    "high": "sparse, cut once",
    "top": "top_magnitude",
    "random": "random_support",
}
updated_percent = COLUMNS["updated (%)"]


def records(experiment: Experiment, method: str) -> list[Mapping[str, Any]]:
    """Return the metrics of a method's seeds at its chosen learning rate."""
    try:
        lr = experiment.best_rate(method)
    except LookupError:
        return []
    found = [read(experiment.run(method, lr, seed)) for seed in experiment.seeds]
    return [record["metrics"] for record in found if record is not None]


def spread(
    metrics: Sequence[Mapping[str, Any]], value: Callable[[Any], float]
) -> tuple[float, float]:
    """Return mean and standard deviation over seeds (0 of one)."""
    values = [value(m) for m in metrics]
    return statistics.mean(values), statistics.stdev(values) if values[1:] else 0.0


def draw_tradeoff(experiment: Experiment, path: Path) -> None:
    """Draw error on the test frames against drift on crystals outside of the data."""
    measured = {
        method: [m for m in records(experiment, method) if m.get("retention")]
        for method in experiment.methods
        if method not in OFF_THE_SCALE
    }
    if not any(measured.values()):
        return
    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    shapes = itertools.cycle("osD^vP*X")
    for method, metrics in measured.items():
        if not metrics:
            continue
        x = spread(metrics, lambda m: m["retention"]["forces_drift_mev_per_angstrom"])
        y = spread(metrics, lambda m: m["test"][SCORE])
        label = f"{method} ({len(metrics)})"
        axes.errorbar(x[0], y[0], y[1], x[1], next(shapes), capsize=3, label=label)
    axes.set(
        xlabel="force drift on 40 other crystals (meV/Å)",
        ylabel="force MAE on the test frames (meV/Å)",
        title=f"{experiment.protocol}, {experiment.model}",
    )
    figure.legend(title="method (seeds)", loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_budget(sizes: Experiment, path: Path) -> None:
    """Draw the error against the share of parameters that may be updated."""
    main = Experiment.read(sizes.name.removesuffix("-budget"))
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, label in SUPPORTS.items():
        points = {}
        for method in sizes.methods:
            start, _, percent = method.partition("-")
            if start == name and (metrics := records(sizes, method)):
                points[float(percent)] = metrics[0]["test"][SCORE]
        whole = next(m for m in main.methods if m.startswith(name))
        if metrics := records(main, whole):
            points[DEFAULT_PERCENT] = metrics[0]["test"][SCORE]
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=label)
    for name, style in (("full", "--"), ("elora", ":")):
        if metrics := records(main, name):
            axes.axhline(metrics[0]["test"][SCORE], ls=style, c="grey", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="updated (% of all parameters)",
        ylabel="force MAE on the test frames (meV/Å)",
        title=f"{main.protocol}, {main.model}, seed {sizes.seeds[0]}",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_decay(experiment: Experiment, path: Path) -> None:
    """Draw error and updated share against the decay of the threshold."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(6.4, 6.4), layout="constrained"
    )
    decays: set[float] = set()
    for start, select in SELECTIONS.items():
        points = {
            float(decay): metrics[0]
            for name, _, decay in (m.partition("-") for m in experiment.methods)
            if name == start and (metrics := records(experiment, f"{name}-{decay}"))
        }
        decays |= points.keys()
        errors = [m["test"][SCORE] for m in points.values()]
        shares = [updated_percent(m) for m in points.values()]
        above.plot(points.keys(), errors, "o-", label=f"--select {select}")
        below.plot(points.keys(), shares, "o-")
    smallest = min(decay for decay in decays if decay > 0)
    below.set_xscale("symlog", linthresh=smallest)
    below.set(
        xlim=(-smallest / 2, None),
        yscale="log",
        xlabel="decay of the threshold",
        ylabel="updated (% of all parameters)",
    )
    above.set(
        ylabel="test force MAE (meV/Å)",
        title=f"{experiment.protocol}, mace-small, seed {experiment.seeds[0]}",
    )
    above.legend()
    below.yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_selection(experiment: Experiment, path: Path) -> None:
    """Draw error against updated share, for each kind of weights."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for method in experiment.methods:
        if metrics := records(experiment, method):
            x = spread(metrics, updated_percent)
            y = spread(metrics, lambda m: m["test"][SCORE])
            axes.errorbar(x[0], y[0], y[1], x[1], "o", capsize=3, label=method)
    axes.set(
        xlabel="updated (% of all parameters)",
        ylabel="force MAE on the test frames (meV/Å)",
        title=f"{experiment.protocol}, mace-small, preset low",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for pattern, draw in (
        ("*-7net-0", draw_tradeoff),
        ("*-7net-0-budget", draw_budget),
        ("*-decay", draw_decay),
        ("*-selection", draw_selection),
    ):
        for path in sorted((HERE / "experiments").glob(f"{pattern}.yaml")):
            if (HERE / "results" / path.stem).is_dir():
                draw(Experiment.read(path.stem), folder / f"{path.stem}.png")


if __name__ == "__main__":
    main()
