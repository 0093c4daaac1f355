"""Shared fixtures: a private trust list, a tiny SevenNet, and small labelled data."""

from __future__ import annotations

import types
import warnings
from pathlib import Path

import ase
import ase.build
import ase.io
import numpy as np
import pytest
import torch

from pathtune import api, discovery, robustness

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    missing = [
        name
        for name in discovery.names("backends")
        if not discovery.load("backends", name).Backend.is_installed()
    ]
    for item in items:
        for name in missing:
            if item.get_closest_marker(name):
                reason = f"the {name} extra is not installed"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def session_trust_list(tmp_path_factory):
    """No fixture reads or writes the user's own list of trusted checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHTUNE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def short_simulations():
    """The simulation that ends every run is cut short; its own tests are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "N_STEPS", 3)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_reports():
    """Runs in this process draw no report, which takes seconds; its own tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "report", types.SimpleNamespace(write=lambda folders: None))
        yield


@pytest.fixture(autouse=True)
def private_trust_list(tmp_path_factory, monkeypatch):
    """No test reads or writes the list of another one."""
    monkeypatch.setenv("PATHTUNE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def tiny_sevennet(tmp_path_factory) -> Path:
    """Write a SevenNet checkpoint of 2134 random parameters: H, C, O, Cu; l_max 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sevenn
        from sevenn import _keys as KEY
        from sevenn._const import model_defaults
        from sevenn.model_build import build_E3_equivariant_model
        from sevenn.util import chemical_species_preprocess

        config = {
            KEY.CUTOFF: 4.0,
            KEY.NODE_FEATURE_MULTIPLICITY: 8,
            KEY.RADIAL_BASIS: {KEY.RADIAL_BASIS_NAME: "bessel"},
            KEY.CUTOFF_FUNCTION: {KEY.CUTOFF_FUNCTION_NAME: "XPLOR", "cutoff_on": 3.5},
            KEY.INTERACTION_TYPE: "nequip",
            KEY.LMAX: 1,
            KEY.IS_PARITY: True,
            KEY.NUM_CONVOLUTION: 2,
            KEY.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS: [16],
            KEY.ACTIVATION_RADIAL: "silu",
            KEY.ACTIVATION_SCARLAR: {"e": "silu", "o": "tanh"},
            KEY.ACTIVATION_GATE: {"e": "silu", "o": "tanh"},
            KEY.SELF_CONNECTION_TYPE: "nequip",
            KEY.SHIFT: [-1.0, -2.0, -3.0, -4.0],
            KEY.SCALE: [1.0, 1.0, 1.0, 1.0],
            KEY.TRAIN_SHIFT_SCALE: False,
            KEY.CONV_DENOMINATOR: [10.0, 10.0],
            "version": sevenn.__version__,
            **chemical_species_preprocess(["H", "C", "O", "Cu"]),
        }
        config = {**model_defaults(config), **config}
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        model = build_E3_equivariant_model(config)
        torch.set_rng_state(generator_state)
    path = tmp_path_factory.mktemp("models") / "tiny.pth"
    content = {
        "config": config,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {},
        "scheduler_state_dict": {},
        "epoch": 0,
        "time": "-",
        "hash": "-",
    }
    torch.save(content, path)
    return path


@pytest.fixture
def trusted_tiny(tiny_sevennet, private_trust_list) -> str:
    """Return the path of the tiny SevenNet, on the trust list of this test."""
    from pathtune import trust

    trust.remember(tiny_sevennet)
    return str(tiny_sevennet)


def molecules(n: int, seed: int = 0) -> list[ase.Atoms]:
    """Return rattled methanol molecules with the labels of a toy pair potential."""
    frames = []
    for index in range(n):
        atoms = ase.build.molecule("CH3OH")
        atoms.rattle(0.08, seed=1000 * seed + index)
        distances = atoms.get_all_distances() + 10 * np.eye(len(atoms))
        energy = float(((distances - 1.8) ** 2 * (distances < 3)).sum()) / 2
        difference = atoms.positions[:, None] - atoms.positions[None]
        slope = 2 * (distances - 1.8) * (distances < 3) / distances
        atoms.info["REF_energy"] = energy - 120.0
        atoms.arrays["REF_forces"] = -(slope[..., None] * difference).sum(1)
        frames.append(atoms)
    return frames


def crystals(n: int, seed: int = 0) -> list[ase.Atoms]:
    """Return rattled copper cells with energy, forces and stress of ASE's EMT."""
    from ase.calculators.emt import EMT

    frames = []
    for index in range(n):
        atoms = ase.build.bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell * (1 + 0.02 * (index % 3 - 1)), scale_atoms=True)
        atoms.rattle(0.06, seed=1000 * seed + index)
        atoms.calc = EMT()
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        stress = atoms.get_stress()
        atoms.calc = None
        atoms.info |= {"REF_energy": energy, "REF_stress": stress}
        atoms.arrays["REF_forces"] = forces
        frames.append(atoms)
    return frames


@pytest.fixture
def molecule_files(tmp_path) -> dict[str, str]:
    """Write train, valid and test files of molecules."""
    sizes = {"train": 8, "valid": 3, "test": 3}
    files = {}
    for seed, (name, n) in enumerate(sizes.items()):
        files[name] = str(tmp_path / f"{name}.xyz")
        ase.io.write(files[name], molecules(n, seed))
    return files
