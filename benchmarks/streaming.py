"""Memory and time of a run on structures that stay in their file, against their number.

Writes rattled copper cells with the labels of ASE's effective medium theory to a
database, trains one epoch on it in a process of its own, and prints what the run says
of its peak memory and its steps:

    python benchmarks/streaming.py MODEL 1000 10000 100000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ase.build
import ase.db
import numpy as np
from ase.calculators.emt import EMT


def write(path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    with ase.db.connect(str(path)) as database:
        for _ in range(n):
            atoms = ase.build.bulk("Cu", cubic=True)
            atoms.set_cell(atoms.cell * (1 + rng.normal(0, 0.01)), scale_atoms=True)
            atoms.positions += rng.normal(0, 0.06, atoms.positions.shape)
            atoms.calc = EMT()
            atoms.get_stress()
            database.write(atoms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("numbers", type=int, nargs="+")
    given = parser.parse_args()
    for n in given.numbers:
        with tempfile.TemporaryDirectory() as folder:
            data, output = Path(folder) / "train.db", Path(folder) / "run"
            write(data, n)
            start = time.perf_counter()
            line = [sys.executable, "-m", "pathtune", "finetune", "--model"]
            line += [given.model, "--train", str(data), "--output", str(output)]
            line += ["--stream-above", "0", "--max-epochs", "1", "--batch-size", "64"]
            line += ["--set", "valid_fraction=0.02", "--retention", "none"]
            subprocess.run(
                [*line, "--trust-checkpoint"], check=True, capture_output=True
            )
            result = json.loads((output / "metrics.json").read_text())
            timing = {name: round(x, 3) for name, x in result["timing"].items()}
            took = round(time.perf_counter() - start, 1)
            print(n, "structures", result["steps"], "steps", timing, took, "s in all")


if __name__ == "__main__":
    main()
