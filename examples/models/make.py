"""Make the small pre-trained models of this folder: label, then train each family.

    python make.py label  DATA      # needs the sevennet extra; about two minutes
    python make.py mace   DATA      # needs the mace extra; about ten minutes
    python make.py nequip DATA      # needs the nequip extra; about ten minutes

DATA is a folder for the labelled structures. The labels are SevenNet-0's, the trainers
are the vendors' own, and the seeds are fixed; times are for two cores without a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import yaml
from ase import Atoms
from ase.collections import g2

from pathtune import retention

HERE = Path(__file__).parent
ELEMENTS = (
    *("H", "Li", "C", "N", "O", "Mg", "Al", "Si"),
    *("S", "Ti", "Fe", "Co", "Ni", "Cu", "Ge", "Mo"),
)
N_CRYSTALS, N_MOLECULES, N_VALID = 3600, 1500, 100
R_MAX = 4.5


def molecules(n: int, seed: int = 0) -> list[Atoms]:
    """Return rattled molecules of the G2 set in a periodic box."""
    generator = np.random.default_rng(seed)
    names = [
        name
        for name in g2.names
        if len(g2[name]) > 1 and set(g2[name].symbols) <= set(ELEMENTS)
    ]
    frames = []
    for name in generator.choice(names, n):
        atoms = ase.build.molecule(str(name))
        spread = generator.uniform(0.02, 0.15)
        atoms.positions += generator.normal(0, spread, atoms.positions.shape)
        atoms.center(vacuum=R_MAX)
        atoms.pbc = True
        atoms.info["config_type"] = "molecule"
        frames.append(atoms)
    return frames


def label(data: Path) -> None:
    """Write train.xyz and valid.xyz with SevenNet-0's energies, forces and stresses."""
    import pathtune
    from pathtune.prediction import predict
    from pathtune.properties import Structure

    frames = [*retention.prototypes(ELEMENTS, N_CRYSTALS), *molecules(N_MOLECULES)]
    base = pathtune.load("7net-0", device="cpu")
    predictions = predict(base, [Structure(a) for a in frames])
    kept = []
    for atoms, predicted in zip(frames, predictions, strict=True):
        # SevenNet-0 knows little about atoms squeezed to where forces are this large.
        if np.abs(predicted["forces"]).max() > 15:
            continue
        atoms.info["REF_energy"] = float(predicted["energy"])
        atoms.info["REF_stress"] = predicted["stress"]
        atoms.arrays["REF_forces"] = predicted["forces"]
        kept.append(atoms)
    order = np.random.default_rng(1).permutation(len(kept))
    data.mkdir(parents=True, exist_ok=True)
    ase.io.write(data / "valid.xyz", [kept[i] for i in order[:N_VALID]])
    ase.io.write(data / "train.xyz", [kept[i] for i in order[N_VALID:]])


def mace(data: Path) -> None:
    """Train mace-small.model with ``mace_run_train``."""
    settings = {
        "name": "small",
        "work_dir": data / "mace",
        "train_file": data / "train.xyz",
        "valid_file": data / "valid.xyz",
        "E0s": "average",
        "model": "ScaleShiftMACE",
        "hidden_irreps": "24x0e + 24x1o",
        "num_interactions": 2,
        "interaction_first": "RealAgnosticDensityInteractionBlock",
        "interaction": "RealAgnosticDensityResidualInteractionBlock",
        "correlation": 2,
        "max_ell": 2,
        "r_max": R_MAX,
        "num_radial_basis": 8,
        "radial_MLP": "[16, 16]",
        "MLP_irreps": "8x0e",
        "loss": "universal",
        "energy_weight": 1,
        "forces_weight": 10,
        "stress_weight": 10,
        "compute_stress": True,
        "scaling": "rms_forces_scaling",
        "default_dtype": "float32",
        "lr": 0.01,
        "batch_size": 32,
        "valid_batch_size": 32,
        "max_num_epochs": 60,
        "eval_interval": 5,
        "scheduler_patience": 3,
        "ema": None,
        "ema_decay": 0.995,
        "amsgrad": None,
        "device": "cpu",
        "seed": 1,
        "error_table": "PerAtomMAE",
    }
    arguments = [f"--{k}" if v is None else f"--{k}={v}" for k, v in settings.items()]
    vendor("mace_run_train", *arguments)
    shutil.copy(data / "mace" / "small.model", HERE / "mace-small.model")


def nequip(data: Path) -> None:
    """Train nequip-small.nequip.zip with ``nequip-train``; settings in nequip.yaml."""
    frames = ase.io.read(data / "train.xyz", ":")
    counts = np.array([[list(a.symbols).count(e) for e in ELEMENTS] for a in frames])
    energies = np.array([atoms.info["REF_energy"] for atoms in frames])
    shifts = np.linalg.lstsq(counts, energies)[0]
    settings = {
        "r_max": R_MAX,
        "elements": list(ELEMENTS),
        "shifts": dict(zip(ELEMENTS, shifts.tolist(), strict=True)),
        **yaml.safe_load((HERE / "nequip.yaml").read_text()),
    }
    (data / "nequip.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    # A package carries its settings: paths in them are relative to the data.
    vendor(
        *("nequip-train", f"--config-dir={data}", "--config-name=nequip"),
        *("hydra.run.dir=nequip", "trainer.callbacks.0.dirpath=nequip"),
        cwd=data,
    )
    package = HERE / "nequip-small.nequip.zip"
    package.unlink(missing_ok=True)
    vendor("nequip-package", "build", "nequip/best.ckpt", package, cwd=data)


def vendor(command: str, *arguments: str | Path, cwd: Path | None = None) -> None:
    """Run a command of the vendor's package from this environment."""
    program = Path(sys.executable).with_name(command)
    subprocess.run([program, *arguments], check=True, cwd=cwd)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("label", "mace", "nequip"))
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    globals()[given.step](given.data.resolve())
