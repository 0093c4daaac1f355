"""One record for each family: what the contract tests need to know about it."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pathtune.backends.base import undisturbed
from tests.conftest import ROOT

MODELS = ROOT / "examples" / "models"


@dataclass(frozen=True)
class Family:
    """A family of potentials as its contract tests see it.

    Parameters
    ----------
    model
        A pre-trained model: a released name, or a file of this repository.
    suffix
        Of its merged files.
    calculator
        File -> the vendor's ASE calculator, made as the vendor's docs say. A released
        name is passed where `model` is one.
    broken
        Context in which a loaded backend's model is not equivariant any more.
    predicts_molecules
        Whether the vendor's calculator takes structures without a cell.
    noise
        What float32 leaves open of forces (eV/Å).
    precision
        In which symmetry is tested: float64 where the family allows it.
    """

    model: str
    suffix: str
    calculator: Callable[[str], Any]
    broken: Callable[[Any], contextlib.AbstractContextManager[None]]
    predicts_molecules: bool = True
    noise: float = 2e-6
    precision: str = "float64"


@contextlib.contextmanager
def _component_wise(module: torch.nn.Module, pick: Callable[[Any], Any]) -> Iterator:
    """Scale a layer's output component by component, as no path weight could."""

    def hook(_module, _args, output):
        features = pick(output)
        scale = 1 + 0.1 * torch.linspace(-1, 1, features.shape[-1])
        features.mul_(scale.to(features))
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _vendor(module: str, name: str) -> Any:
    """Import something of the vendor's, without its warnings and side effects."""
    with undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def _sevennet(model: str) -> Any:
    calculator = _vendor("sevenn.calculator", "SevenNetCalculator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calculator(model, device="cpu")


def _chgnet(model: str) -> Any:
    calculator = _vendor("chgnet.model", "CHGNetCalculator")
    if model == "chgnet":
        return calculator(use_device="cpu")
    return calculator.from_file(model, use_device="cpu")


@contextlib.contextmanager
def _stretched_angles(module: torch.nn.Module) -> Iterator:
    """Measure angles between stretched vectors; all other features are scalars."""

    def hook(_module, vectors):
        stretch = torch.tensor([0.9, 0.95, 1.0])
        return tuple(v * stretch.to(v) for v in vectors)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _mace(model: str) -> Any:
    calculator = _vendor("mace.calculators", "MACECalculator")
    with undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # as `import mace` does
        return calculator(model_paths=model, device="cpu", default_dtype="float32")


def _nequip(model: str) -> Any:
    """Return the calculator as in a process that the vendor has set up for good."""
    from pathtune.backends.nequip import _vendor_state

    vendor = _vendor("nequip.integrations.ase", "NequIPCalculator")

    class Calculator(vendor):
        def calculate(self, *args, **kwargs):
            with undisturbed(torch.float64):
                super().calculate(*args, **kwargs)

    with _vendor_state():
        return Calculator._from_saved_model(
            model, device="cpu", chemical_species_to_atom_type_map=True
        )


FAMILIES: dict[str, Family] = {
    "chgnet": Family(
        model="chgnet",
        suffix=".pth.tar",
        calculator=_chgnet,
        broken=lambda backend: _stretched_angles(backend.model.angle_basis_expansion),
        predicts_molecules=False,
        noise=2e-5,  # angles close to 180°; the vendor itself is off by up to 5e-5
    ),
    "mace": Family(
        model=str(MODELS / "mace-small.model"),
        suffix=".model",
        calculator=_mace,
        broken=lambda backend: _component_wise(
            backend.model.interactions[0].linear, lambda features: features
        ),
    ),
    "nequip": Family(
        model=str(MODELS / "nequip-small.nequip.zip"),
        suffix=".nequip.zip",
        calculator=_nequip,
        broken=lambda backend: _component_wise(
            backend.model.get_submodule("model.func.layer0_convnet.conv.linear_2"),
            lambda features: features,
        ),
    ),
    "sevennet": Family(
        model="7net-0",
        suffix=".pth",
        calculator=_sevennet,
        broken=lambda backend: _component_wise(
            backend.model._modules["1_self_interaction_2"], lambda data: data["x"]
        ),
    ),
}
