"""Run the rMD17 protocol with 50 training frames and record its summary.

Training frames 0-49 and validation frames 50-69 of ``<molecule>_train_01.xyz``, test
frames 0-199 of ``<molecule>_test_01.xyz`` (official split 01, file order). The data are
not part of this repository: give the folder that holds the two files. Only the preset
is given to pathtune; everything else is its default.

    python benchmarks/rmd17.py DATA --molecule ethanol --preset low

A run that was interrupted is continued, a finished one is only recorded.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import ase.io
import yaml

HERE = Path(__file__).parent
SLICES = {
    "train": ("train", 0, 50),
    "valid": ("train", 50, 70),
    "test": ("test", 0, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--molecule", default="ethanol")
    parser.add_argument("--preset", default="low")
    parser.add_argument("--model", default="7net-0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()

    folder = given.runs / f"rmd17-50-{given.molecule}"
    folder.mkdir(parents=True, exist_ok=True)
    for part, (source, start, stop) in SLICES.items():
        frames = ase.io.read(
            given.data / f"{given.molecule}_{source}_01.xyz", f"{start}:{stop}"
        )
        ase.io.write(folder / f"{part}.xyz", frames)
    run = f"{given.preset}-seed{given.seed}"
    command = ["pathtune", "finetune", "--model", given.model]
    for part in SLICES:
        command += [f"--{part}", f"{part}.xyz"]
    command += ["--preset", given.preset, "--output", run]
    if given.seed:
        command += ["--seed", str(given.seed)]
    resume = [*command[1:], "--resume"]
    subprocess.run([sys.executable, "-m", "pathtune", *resume], cwd=folder, check=True)

    results = {
        "protocol": f"rmd17-50 {given.molecule}",
        "command": shlex.join(command),
        "config": yaml.safe_load((folder / run / "config.yaml").read_text()),
        "environment": json.loads((folder / run / "environment.json").read_text()),
        "metrics": json.loads((folder / run / "metrics.json").read_text()),
    }
    name = f"rmd17-50-{given.molecule}-{given.model}-{run}.json"
    (HERE / "results" / name).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
