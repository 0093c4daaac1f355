"""Rank the magnetic orderings of CoCO3, each by a model that has not seen it.

    python benchmarks/orderings.py DATA [--steps N] [--method frozen]

Six runs leave out one ordering each (protocol ``coco3/0`` to ``coco3/5``). A model is
asked for the energies of the last calculations of all six; that of its left-out
ordering, relative to those it was trained on, is the prediction. One JSON file below
``results/`` holds the six predictions, the labels, and Spearman's rank correlation.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import protocols
from ase.io import read
from compare import HERE
from scipy.stats import spearmanr

N_ORDERINGS = 6
SETTINGS = (
    *("--batch-size", "2"),
    *("--set", "retention=none", "--set", "energy_weight=100"),
)


def predicted(folder: Path, held_out: int, line: list[str]) -> tuple[float, float]:
    """Return prediction and label of the left-out ordering (meV/atom)."""
    run = [sys.executable, "-m", "pathtune"]
    files = [f"--{part}={folder / part}.xyz" for part in ("train", "valid", "test")]
    output = ["--output", str(folder / "run"), "--resume"]
    subprocess.run([*run, *line, *files, *output], check=True)
    delta = str(folder / "run" / "delta.safetensors")
    ask = ["evaluate", str(folder / "static.xyz"), "--model", "7net-0", "--json"]
    ask += ["--delta", delta, "--orderings", "formula"]
    found = subprocess.run([*run, *ask], check=True, capture_output=True, text=True)
    (group,) = json.loads(found.stdout)["orderings"]["groups"]
    places = [atoms.info["ordering"] for atoms in read(folder / "static.xyz", ":")]
    unseen = (held_out, (held_out + 1) % N_ORDERINGS)  # it tests, the other validates
    relative = []
    for energies in (group["predicted"], group["labelled"]):
        by_ordering = dict(zip(places, energies, strict=True))
        known = [e for place, e in by_ordering.items() if place not in unseen]
        relative.append(by_ordering[held_out] - sum(known) / len(known))
    return relative[0], relative[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", default="frozen", choices=["frozen", "low", "full"])
    given = parser.parse_args()
    option = "--preset" if given.method == "low" else "--method"
    chosen = [option, given.method]
    line = ["finetune", "--model", "7net-0", "--spin", *chosen, *SETTINGS]
    line += ["--max-steps", str(given.steps), "--eval-every", str(given.steps // 2)]
    rows = []
    for held_out in range(N_ORDERINGS):
        folder = given.runs / f"coco3-{given.method}-{held_out}"
        protocols.write(f"coco3/{held_out}", given.data, folder)
        energy, label = predicted(folder, held_out, line)
        rows.append({"held_out": held_out, "predicted": energy, "labelled": label})
        print(rows[-1], flush=True)
    ranks = spearmanr(
        *([row[key] for row in rows] for key in ("predicted", "labelled"))
    )
    result = {
        "command": shlex.join(["pathtune", *line]),
        "orderings_mev_per_atom": rows,
        "spearman": float(ranks.statistic),
    }
    path = HERE / "results" / f"coco3-7net-0-{given.method}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Spearman {ranks.statistic:.3f}, in {path}")


if __name__ == "__main__":
    main()
