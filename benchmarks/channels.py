"""Whether a sparse change of element-resolved weights goes to d channels of metals.

    python benchmarks/channels.py DATA [--steps 400] [--controls] [--folder RUNS]

CoCO3 in six magnetic orderings, with the small MACE of ``examples/models``, whose fully
connected tensor products have weights for each element and degree. Five seeds of the
sparse method, with ``--controls`` one run each of a random support of equal size and of
ELoRA, then `pathtune.explain.compare`. The result is one file below ``results/``. DATA
is the folder of the data sets; see README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import protocols

from pathtune.explain import Explanation, compare, explain_run
from pathtune.explain.cells import CHANNELS, rows
from pathtune.explain.comparison import over_seeds
from pathtune.explain.enrichment import enrichment
from pathtune.provenance import versions

HERE = Path(__file__).resolve().parent
MODEL = "examples/models/mace-small.model"
METAL = "Co"
SEEDS = range(5)
BY = ("element", "degree")


def train(folder: Path, name: str, flags: Sequence[str], steps: int) -> str:
    """Run once, unless it is there; return the command."""
    files = {part: f"{part}.xyz" for part in ("train", "valid", "test")}
    command = [
        *("pathtune", "finetune", "--model", MODEL, "--trust-checkpoint"),
        *(word for part, file in files.items() for word in (f"--{part}", file)),
        *("--output", name, "--resume", "--retention", "none", "--batch-size", "4"),
        *("--max-steps", str(steps), "--eval-every", "50", *flags),
    ]
    line = [sys.executable, "-m", *command]
    line[line.index(MODEL)] = str(HERE.parent / MODEL)
    if not (folder / name / "metrics.json").exists():
        subprocess.run(line, cwd=folder, check=True)
    return shlex.join(command)


def within_one_layer(explanation: Explanation) -> list[dict[str, Any]]:
    """Return enrichment by element and degree inside the first layer's tensor product.

    The universe is one tensor, in which every degree and element has as many entries:
    differences between kinds of layers and between layers have no part in it.
    """
    product = explanation.cells.where(
        lambda key: key["kind"] == "fctp" and key["layer"] == "0"
    )
    return enrichment(product, BY)


def headline(explanation: Explanation) -> Mapping[str, float]:
    """Return what the d channels of a metal hold of the element-resolved change."""
    part = explanation.cells.where(lambda key: key["element"] is not None)
    table = {(r["element"], r["degree"]): r for r in rows(part, BY) if r["alive"]}
    alive = sum(r["alive"] for r in table.values())
    chosen = table[METAL, CHANNELS.index("d")]
    return {
        "share_of_square_norm": chosen["share"],
        "share_of_entries": chosen["alive"] / alive,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("channels-runs"))
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for part, frames in protocols.coco3(given.data, held_out=0).items():
        if not (folder / f"{part}.xyz").exists():
            ase.io.write(folder / f"{part}.xyz", frames)
    runs = {f"sparse-seed{s}": ["--preset", "high", "--seed", str(s)] for s in SEEDS}
    if given.controls:
        runs["random"] = ["--method", "random_support"]
        runs["elora"] = ["--method", "elora"]
    commands = {n: train(folder, n, f, given.steps) for n, f in runs.items()}
    model = str(HERE.parent / MODEL)
    explained = [
        explain_run(folder / n, model=model, name=n, trust_checkpoint=True)
        for n in runs
    ]
    seeds = explained[: len(SEEDS)]
    document = compare(explained).document
    (group,) = document["groups"]
    result = {
        "commands": commands,
        "versions": versions("pathtune", "torch", "mace-torch", "e3nn", "scipy"),
        "metrics": {
            n: {
                part: json.loads((folder / n / "metrics.json").read_text())[part]
                for part in ("zero_shot", "test", "sparsity")
            }
            for n in runs
        },
        "headline": {e.name: headline(e) for e in explained},
        "element_resolved": {
            "over_seeds": group["orbitals"],
            **{e.name: e.document["orbitals"] for e in explained},
        },
        "first_tensor_product": {
            "over_seeds": over_seeds([within_one_layer(e) for e in seeds], BY),
            **{e.name: within_one_layer(e) for e in explained},
        },
        "stability": group["stability"],
        "pairs": document["pairs"],
    }
    path = HERE / "results" / "channels-coco3-mace-small.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
