"""Make the ethylene carbonate example data set.

Langevin dynamics with SevenNet-0 gives the geometries; PySCF labels them at the
r2SCAN/def2-SVP level. Every step caches its results, so a killed run resumes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.data import covalent_radii
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS

FUNCTIONAL = "r2scan"
BASIS = "def2-svp"
AUX_BASIS = "def2-universal-jfit"
# SCF stages as (grid level, convergence in Hartree): the coarse grid only gives
# the starting density of the last stage, which alone makes the label.
STAGES = ((1, 1e-6), (3, 1e-9))

TIMESTEP_FS = 0.5
SPACING_FS = 50.0
EQUILIBRATION_FS = 250.0
FRICTION_PER_FS = 0.02
TEMPERATURES_K = (300, 500, 800)

# A frame is kept if every bond of the relaxed molecule is between these multiples
# of its relaxed length and no other pair is as close as a bond.
BOND_RANGE = (0.75, 1.35)
CONTACT_FACTOR = 1.2
MAX_DISCARDED = 20


class Trajectory(NamedTuple):
    """One independent run of molecular dynamics."""

    split: str
    temperature: int
    seed: int
    n_frames: int

    @property
    def name(self) -> str:
        """Name of the cached files of this run."""
        return f"{self.split}_{self.temperature}K_seed{self.seed}"


# (split, number of the run, frames per run), repeated at each temperature
RUNS = (("train", 0, 16), ("test", 1, 16), ("train", 2, 16), ("valid", 3, 6))
TRAJECTORIES = tuple(
    Trajectory(split, temperature, 1000 * run + temperature, n_frames)
    for split, run, n_frames in RUNS
    for temperature in TEMPERATURES_K
)


def start_geometry() -> Atoms:
    """Return a rough twisted ring of ethylene carbonate, before relaxation.

    Returns
    -------
    Atoms
        C3H4O3 without a cell.
    """
    positions = [
        (0.00, 0.00, -0.80),  # carbonyl C
        (0.00, 0.00, -2.00),  # carbonyl O
        (1.12, 0.00, 0.00),
        (-1.12, 0.00, 0.00),
        (0.75, 0.10, 1.37),
        (-0.75, -0.10, 1.37),
        (1.18, 1.05, 1.75),
        (1.20, -0.70, 1.97),
        (-1.18, -1.05, 1.75),
        (-1.20, 0.70, 1.97),
    ]
    return Atoms("COOOCCHHHH", positions)


def bond_matrix(atoms: Atoms) -> np.ndarray:
    """Return which pairs of atoms are bonded, by covalent radii.

    Parameters
    ----------
    atoms
        The molecule.

    Returns
    -------
    np.ndarray
        Symmetric boolean matrix, false on the diagonal.
    """
    radii = covalent_radii[atoms.numbers]
    limit = CONTACT_FACTOR * (radii[:, None] + radii[None, :])
    bonded = atoms.get_all_distances() < limit
    np.fill_diagonal(bonded, False)
    return bonded


def is_intact(atoms: Atoms, relaxed: Atoms) -> bool:
    """Tell whether a frame still has the bonds of the relaxed molecule.

    Parameters
    ----------
    atoms
        The frame.
    relaxed
        The relaxed molecule, atoms in the same order.

    Returns
    -------
    bool
        False for a dissociated or rearranged frame.
    """
    bonds = bond_matrix(relaxed)
    ratio = atoms.get_all_distances()[bonds] / relaxed.get_all_distances()[bonds]
    low, high = BOND_RANGE
    new_bond = (bond_matrix(atoms) & ~bonds).any()
    return bool(ratio.min() > low and ratio.max() < high and not new_bond)


def sample(cache: Path) -> None:
    """Run the molecular dynamics that is not cached yet.

    Parameters
    ----------
    cache
        Folder of the cached files.
    """
    from sevenn.calculator import SevenNetCalculator

    calculator = SevenNetCalculator("7net-0", device="cpu")
    relaxed = start_geometry()
    relaxed.calc = calculator
    BFGS(relaxed, logfile=None).run(fmax=0.01, steps=300)

    for run in TRAJECTORIES:
        path = cache / f"{run.name}.xyz"
        if path.exists():
            continue
        rng = np.random.default_rng(run.seed)
        atoms = relaxed.copy()
        atoms.calc = calculator
        atoms.set_constraint(FixCom())
        MaxwellBoltzmannDistribution(atoms, temperature_K=run.temperature, rng=rng)
        dynamics = Langevin(
            atoms,
            TIMESTEP_FS * units.fs,
            temperature_K=run.temperature,
            friction=FRICTION_PER_FS / units.fs,
            fixcm=False,
            rng=rng,
        )
        dynamics.run(round(EQUILIBRATION_FS / TIMESTEP_FS))
        frames: list[Atoms] = []
        discarded = 0
        while len(frames) < run.n_frames:
            dynamics.run(round(SPACING_FS / TIMESTEP_FS))
            if not is_intact(atoms, relaxed):
                discarded += 1
                if discarded > MAX_DISCARDED:
                    raise RuntimeError(f"{run.name}: the molecule fell apart")
                continue
            frame = Atoms(atoms.symbols, atoms.positions)
            frame.info = {
                "config_type": f"md_{run.temperature}K",
                "seed": run.seed,
                "time_fs": dynamics.nsteps * TIMESTEP_FS,
                "discarded": discarded,
            }
            frames.append(frame)
        partial = path.with_suffix(".part")
        write(partial, frames, format="extxyz")
        partial.rename(path)
        print(f"{run.name}: {len(frames)} frames, {discarded} discarded", flush=True)


def solve(atoms: Atoms) -> Any:
    """Converge the Kohn-Sham equations of one frame.

    Parameters
    ----------
    atoms
        The frame.

    Returns
    -------
    Any
        The converged mean-field object of PySCF.
    """
    from pyscf import dft, gto

    molecule = gto.M(
        atom=list(zip(atoms.symbols, atoms.positions.tolist(), strict=True)),
        basis=BASIS,
        unit="Angstrom",
        verbose=0,
    )
    field = dft.RKS(molecule, xc=FUNCTIONAL).density_fit(auxbasis=AUX_BASIS)
    field.conv_check = False
    density = None
    for level, tolerance in STAGES:
        field.grids = dft.Grids(molecule)
        field.grids.level = level
        field.conv_tol = tolerance
        field.kernel(dm0=density)
        density = field.make_rdm1()
    if not field.converged:
        raise RuntimeError("the SCF did not converge")
    return field


def dft_energy_forces(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Return the total energy (eV) and the forces (eV/Å) of one frame.

    Parameters
    ----------
    atoms
        The frame.

    Returns
    -------
    tuple[float, np.ndarray]
        Energy and forces; the forces include the response of the grid.
    """
    field = solve(atoms)
    gradient = field.nuc_grad_method()
    gradient.grid_response = True
    forces = -np.asarray(gradient.kernel()) * units.Hartree / units.Bohr
    return float(field.e_tot) * units.Hartree, forces


def label(cache: Path) -> None:
    """Label the cached frames that have no label yet.

    Parameters
    ----------
    cache
        Folder of the cached files.
    """
    todo: list[tuple[str, Path, int, Atoms]] = []
    total = sum(run.n_frames for run in TRAJECTORIES)
    for run in TRAJECTORIES:
        path = cache / f"{run.name}.xyz"
        labels = cache / f"{run.name}.jsonl"
        done = len(labels.read_text().splitlines()) if labels.exists() else 0
        frames = read(path, index=":") if path.exists() else []
        todo += [(run.name, labels, i, frames[i]) for i in range(done, len(frames))]
    for count, (name, labels, i, frame) in enumerate(todo, start=1):
        start = time.perf_counter()
        energy, forces = dft_energy_forces(frame)
        seconds = time.perf_counter() - start
        record = {"energy": energy, "forces": forces.tolist(), "seconds": seconds}
        with labels.open("a") as file:
            file.write(json.dumps(record) + "\n")
        progress = f"{count}/{len(todo)} (of {total})"
        print(f"{progress} {name} {i}: {energy:.4f} eV, {seconds:.1f} s", flush=True)


def check_forces(cache: Path, step: float = 0.002) -> None:
    """Compare one force component with finite differences and cache the result.

    Parameters
    ----------
    cache
        Folder of the cached files.
    step
        Displacement in Å.
    """
    path = cache / "check.json"
    if path.exists():
        return
    run = TRAJECTORIES[0]
    frame = read(cache / f"{run.name}.xyz", index=0)
    record = json.loads((cache / f"{run.name}.jsonl").read_text().splitlines()[0])
    atom, axis = 1, 2  # the carbonyl oxygen
    energies = []
    for factor in (-2, -1, 1, 2):
        moved = frame.copy()
        moved.positions[atom, axis] += factor * step
        energies.append(float(solve(moved).e_tot) * units.Hartree)
    # five-point stencil, with an error of fourth order in the step
    weights = np.array([1.0, -8.0, 8.0, -1.0]) / (12 * step)
    numeric = -float(weights @ energies)
    analytic = float(record["forces"][atom][axis])
    check = {
        "frame": f"{run.name}, first frame",
        "scheme": "five-point central differences of the energy",
        "step_A": step,
        "component": f"atom {atom} ({frame.symbols[atom]}), {'xyz'[axis]}",
        "analytic_eV_per_A": round(analytic, 6),
        "finite_difference_eV_per_A": round(numeric, 6),
        "difference_eV_per_A": round(numeric - analytic, 6),
    }
    path.write_text(json.dumps(check))


def export(cache: Path, out: Path) -> None:
    """Write the three extended XYZ files and ``provenance.json``.

    Parameters
    ----------
    cache
        Folder of the cached files.
    out
        Folder to write to.
    """
    from pyscf.dft import libxc

    splits: dict[str, list[Atoms]] = {"train": [], "valid": [], "test": []}
    seconds: list[float] = []
    runs = []
    for run in TRAJECTORIES:
        frames = read(cache / f"{run.name}.xyz", index=":")
        lines = (cache / f"{run.name}.jsonl").read_text().splitlines()
        for frame, line in zip(frames, lines, strict=True):
            record = json.loads(line)
            atoms = Atoms(frame.symbols, frame.positions)
            atoms.info["REF_energy"] = record["energy"]
            atoms.info["config_type"] = frame.info["config_type"]
            atoms.info["frame"] = len(splits[run.split])
            atoms.info["seed"] = int(frame.info["seed"])
            atoms.info["time_fs"] = float(frame.info["time_fs"])
            atoms.arrays["REF_forces"] = np.array(record["forces"])
            splits[run.split].append(atoms)
            seconds.append(record["seconds"])
        discarded = int(frames[-1].info["discarded"])
        runs.append({**run._asdict(), "n_discarded": discarded})
    for split, atoms_list in splits.items():
        write(out / f"{split}.xyz", atoms_list, format="extxyz")

    packages = ("pyscf", "ase", "sevenn", "torch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    provenance = {
        "system": "ethylene carbonate, C3H4O3, one molecule in vacuum",
        "licence": "CC0-1.0",
        "counts": {split: len(frames) for split, frames in splits.items()},
        "units": {"REF_energy": "eV (total)", "REF_forces": "eV/A"},
        "labels": {
            "method": "restricted Kohn-Sham, all electrons, density-fitted Coulomb",
            "functional": FUNCTIONAL,
            "basis": BASIS,
            "auxiliary_basis": AUX_BASIS,
            "grid_level": STAGES[-1][0],
            "conv_tol_hartree": STAGES[-1][1],
            "starting_density": dict(
                zip(("grid_level", "conv_tol_hartree"), STAGES[0], strict=True)
            ),
            "grid_response_in_forces": True,
            "mean_seconds_per_frame": round(float(np.mean(seconds)), 1),
            "force_check": json.loads((cache / "check.json").read_text()),
        },
        "sampling": {
            "potential": "SevenNet-0 (7net-0)",
            "dynamics": "Langevin, centre of mass fixed",
            "temperatures_K": TEMPERATURES_K,
            "timestep_fs": TIMESTEP_FS,
            "friction_per_fs": FRICTION_PER_FS,
            "equilibration_fs": EQUILIBRATION_FS,
            "spacing_fs": SPACING_FS,
            "discard_rule": (
                f"bond outside {BOND_RANGE[0]} to {BOND_RANGE[1]} times its relaxed "
                f"length, or a new pair within {CONTACT_FACTOR} times the sum of "
                "the covalent radii"
            ),
            "trajectories": runs,
        },
        "split_rule": "by trajectory: no seed is shared between two files",
        "versions": {**versions, "libxc": libxc.__version__},
    }
    text = json.dumps(provenance, indent=2) + "\n"
    (out / "provenance.json").write_text(text)


def main() -> None:
    """Run the steps named on the command line, all of them by default."""
    here = Path(__file__).resolve().parent
    steps = ("sample", "label", "check", "export")
    parser = argparse.ArgumentParser(description="Make the example data set.")
    parser.add_argument("steps", nargs="*", help=f"any of {', '.join(steps)}")
    parser.add_argument("--out", type=Path, default=here, help="output folder")
    parser.add_argument("--cache", type=Path, default=Path("ec_cache"))
    options = parser.parse_args()
    unknown = set(options.steps) - set(steps)
    if unknown:
        parser.error(f"unknown step: {', '.join(sorted(unknown))}")
    chosen = options.steps or steps
    options.cache.mkdir(parents=True, exist_ok=True)
    if "sample" in chosen:
        sample(options.cache)
    if "label" in chosen:
        label(options.cache)
    if "check" in chosen:
        check_forces(options.cache)
    if "export" in chosen:
        export(options.cache, options.out)


if __name__ == "__main__":
    main()
