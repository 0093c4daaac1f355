"""Draw what a run did: validation error and updated share against the step.

It reads the run folder's metrics.jsonl and metrics.json only::

    python docs/images/make_result.py demo-run docs/images/result.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

KEY = "forces_mae_mev_per_angstrom"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#606060"


def draw(run: Path, output: Path) -> None:
    """Draw the learning curve and the updated share of a finished run.

    Parameters
    ----------
    run
        Run folder with ``metrics.jsonl`` and ``metrics.json``.
    output
        Picture to write; the suffix decides its format.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    results = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    steps = [r["step"] for r in records]
    errors = [r["valid"][KEY] for r in records]
    updated = [100 * (1 - r["sparsity"]["total_sparsity"]) for r in records]
    # Zero-shot errors are those of the frames the result is judged on.
    judged = "test" if results["test"] else "valid"
    before, after = results["zero_shot"][KEY], results[judged][KEY]

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    left.axhline(
        before, color=GREY, ls="--", label=f"zero-shot, {judged}: {before:.1f} meV/Å"
    )
    left.plot(steps, errors, color=BLUE, marker="o", ms=3, label="fine-tuned, valid")
    left.plot(
        results["best_step"],
        after,
        color=ORANGE,
        marker="*",
        ms=11,
        ls="none",
        label=f"best step, {judged}: {after:.1f} meV/Å",
    )
    left.set(xlabel="step", ylabel="force MAE (meV/Å)", yscale="log")
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(NullFormatter())
    ticks = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    low, high = min([*errors, after]), max([*errors, before])
    left.set_yticks([t for t in ticks if low / 2 <= t <= 2 * high])
    left.set_ylim(low / 1.3, high * 1.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)

    right.plot(steps, updated, color=BLUE, marker="o", ms=3)
    right.set(xlabel="step", ylabel="share of parameters updated (%)")
    right.set_ylim(0, 1.1 * max(updated))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    # Without a software tag, equal runs give equal pictures.
    figure.savefig(output, dpi=160, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, help="picture to write")
    arguments = parser.parse_args()
    draw(arguments.run, arguments.output)


if __name__ == "__main__":
    main()
