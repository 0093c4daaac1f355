"""Data sets and how they are split; the files lie in a folder of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import ase.build
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT

Parts = dict[str, Sequence[Atoms]]


def rmd17_50(data: Path, molecule: str) -> Parts:
    """Return 50 training, 20 validation, 200 test frames of the official split 01."""
    train = ase.io.read(data / "rmd17" / f"{molecule}_train_01.xyz", ":70")
    test = ase.io.read(data / "rmd17" / f"{molecule}_test_01.xyz", ":200")
    return {"train": train[:50], "valid": train[50:], "test": test}


def mlearn(data: Path, element: str, n_train: int | None = None) -> Parts:
    """Return the crystals of one element; the last tenth of each group validates.

    With `n_train` the training frames are thinned out evenly within the file.
    """
    frames = ase.io.read(data / "mlearn" / f"{element}_train.xyz", ":")
    groups: dict[str, list[Atoms]] = {}
    for atoms in frames:
        groups.setdefault(atoms.info["group"], []).append(atoms)
    valid = {
        id(atoms)
        for members in groups.values()
        for atoms in members[-max(1, len(members) // 10) :]
    }
    train = [atoms for atoms in frames if id(atoms) not in valid]
    if n_train is not None:
        train = [train[i * len(train) // n_train] for i in range(n_train)]
    return {
        "train": train,
        "valid": [atoms for atoms in frames if id(atoms) in valid],
        "test": ase.io.read(data / "mlearn" / f"{element}_test.xyz", ":"),
    }


def nio_spin(data: Path) -> Parts:
    """Return 100 training, 20 validation, 31 test frames of NiO in one cell.

    Two classes of frames that are spin rotations of one another go to the training; the
    others are dealt out in the order of the SHA-256 of their index.
    """
    frames = ase.io.read(data / "nio_noncollinear" / "deepmd_examples_151.xyz", ":")
    rotations = {3, 13, 69, 84, 101, 107, 112, 113, 114, 116, 120, 130, 140, 142}
    rotations |= {148, 150}
    rest = sorted(
        (i for i in range(len(frames)) if i not in rotations),
        key=lambda i: hashlib.sha256(str(i).encode()).hexdigest(),
    )
    rows = {
        "train": [*rotations, *rest[:84]],
        "valid": rest[84:104],
        "test": rest[104:],
    }
    return {part: [frames[i] for i in sorted(rows[part])] for part in rows}


def fe_spin(data: Path, n_train: int = 400) -> Parts:
    """Return 400 training, 100 validation, 100 test frames of magnetic iron.

    With another `n_train` the first two are thinned out evenly.
    """
    train = ase.io.read(data / "fe_spin_fitsnap" / "train.xyz", ":")
    test = ase.io.read(data / "fe_spin_fitsnap" / "test.xyz", ":")
    every = 400 // n_train
    return {"train": train[:400:every], "valid": train[400::every], "test": test}


def coco3(data: Path, held_out: int) -> Parts:
    """Return CoCO3 split by magnetic ordering, 0 to 5: one tests, the next validates.

    Moments are known at the end of each relaxation only; its other steps start from
    them. Frames of one ordering stand together. Every frame names its ordering in
    ``ordering``; ``static`` are the last calculations of all orderings, whose energies
    can be compared.
    """
    path = data / "mp_magnetic_small" / "coco3_orderings.xyz"
    frames = ase.io.read(path, ":")
    by_ordering: dict[int, list[Atoms]] = {}
    for atoms in frames:
        atoms.info["ordering"] = int(atoms.info["label"].split()[1])
        by_ordering.setdefault(atoms.info["ordering"], []).append(atoms)
    for members in by_ordering.values():
        final = next(a.arrays["REF_magmoms"] for a in members if a.has("REF_magmoms"))
        for atoms in members:
            atoms.set_initial_magnetic_moments(atoms.arrays.get("REF_magmoms", final))
    parts = {"test": held_out, "valid": (held_out + 1) % len(by_ordering)}
    known = [a for k, m in by_ordering.items() if k not in parts.values() for a in m]
    chosen = {part: by_ordering[ordering] for part, ordering in parts.items()}
    static = [a for a in frames if "static" in a.info["label"]]
    return {"train": known, **chosen, "static": static}


def crystals(data: Path, n_atoms: int, percent: int = 100) -> Parts:
    """Return 40 rattled cells of copper, the only protocol that reads no file.

    Their lattice constant is a percentage of the measured one, so that neighbours can
    be had in any number. Labels are those of effective medium theory.
    """
    generator = np.random.default_rng(0)
    frames = []
    for _ in range(40):
        cell = ase.build.bulk("Cu", a=3.615 * percent / 100, cubic=True)
        atoms = cell.repeat((1, 1, n_atoms // 4))
        atoms.positions += generator.normal(0, 0.05, atoms.positions.shape)
        atoms.calc = EMT()
        atoms.get_stress()
        frames.append(atoms)
    return {"train": frames}


PROTOCOLS: dict[str, Callable[..., Parts]] = {
    "rmd17-50": rmd17_50,
    "mlearn": mlearn,
    "nio-spin": nio_spin,
    "fe-spin": fe_spin,
    "coco3": coco3,
    "crystals": crystals,
}


def write(protocol: str, data: Path, folder: Path) -> None:
    """Write train.xyz, valid.xyz and test.xyz of ``name/argument[/number]``."""
    name, *arguments = protocol.split("/")
    values = [int(a) if a.isdigit() else a for a in arguments]
    folder.mkdir(parents=True, exist_ok=True)
    for part, frames in PROTOCOLS[name](data, *values).items():
        ase.io.write(folder / f"{part}.xyz", frames)
