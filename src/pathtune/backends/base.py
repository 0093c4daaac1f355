"""The contract of a backend: what pathtune asks of a family of potentials."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.paths import Path as IrrepsPath
from pathtune.paths import PathWeight
from pathtune.properties import Property

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class ModelInfo:
    """One released model: ``pathtune models`` prints these."""

    backend: str
    name: str
    available: bool
    reason: str
    checkpoint: str
    heads: tuple[str, ...] = ()
    #: SPDX identifier or name, as the vendor states it; empty where it does not.
    licence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


@contextlib.contextmanager
def undisturbed(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run vendor code; leave the process as it was, also after an error.

    Default dtype, random states, environment variables and warning filters are
    restored.

    Parameters
    ----------
    dtype
        Default dtype inside the scope.
    """
    before = torch.get_default_dtype()
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            if dtype is not None:
                torch.set_default_dtype(dtype)
            yield
    finally:
        torch.set_default_dtype(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn what vendors raise on a wrong or damaged file into one sentence.

    Raises
    ------
    PathtuneError
        With the path, what it was read as, and the first line of the vendor's reason.
    """
    try:
        yield
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        AttributeError,
        AssertionError,
        ImportError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PathtuneError(f"{path} cannot be read as {what}: {reason[0]}") from error


@dataclass(frozen=True, eq=False)
class Features:
    """What a model knows of a batch, as a differentiable function of its geometry.

    Parameters
    ----------
    energy
        (n_structures,) eV.
    scalars
        (n_atoms_total, n_scalars) invariant features of the atoms, of all layers.
    pairs
        (2, n_edges) atoms i and j of each directed edge; both directions are there.
    vectors
        (n_edges, 3) from i to j (Å).
    structure
        (n_atoms_total,) the structure of each atom.
    volumes
        (n_structures,) of the cells (Å^3); anything where there is none.
    leaf
        (n_edges, 3) what energies are differentiated by: their slopes by it are those
        by `vectors` (eV/Å).
    """

    energy: Tensor
    scalars: Tensor
    pairs: Tensor
    vectors: Tensor
    structure: Tensor
    volumes: Tensor
    leaf: Tensor

    def detached(self) -> Features:
        """Return the same numbers, not differentiable any more."""
        parts = ("energy", "scalars", "vectors")
        return replace(self, **{name: getattr(self, name).detach() for name in parts})

    def forces_and_stress(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Return forces and stress, in the conventions of `Backend.predict`.

        Parameters
        ----------
        slopes
            (n_edges, 3) of an energy by `leaf` (eV/Å).
        """
        i, j = self.pairs
        zeros = slopes.new_zeros(len(self.structure), 3)
        forces = zeros.index_add(0, i, slopes).index_add(0, j, -slopes)
        virials = self.vectors.unsqueeze(2) * slopes.unsqueeze(1)
        # Spins that are coupled to the lattice exert torques on it.
        symmetric = (virials + virials.transpose(1, 2)).flatten(1) / 2
        total = slopes.new_zeros(len(self.volumes), 9)
        total = total.index_add(0, self.structure[i], symmetric)
        stress = total / self.volumes.clamp(min=1e-3).unsqueeze(1)
        return forces, stress[:, [0, 4, 8, 5, 2, 1]]


def run_in_turn(
    model: nn.Module, weights: Mapping[str, Tensor], data: Any
) -> Iterator[tuple[str, Any, Any]]:
    """Run the blocks of a sequential model with some parameters replaced.

    Parameters
    ----------
    model
        Its children are run one after the other.
    weights
        Parameter name -> tensor.
    data
        Input of the first block.

    Yields
    ------
    tuple
        Name and module of each block, and its output.
    """
    by_block: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        block, _, rest = name.partition(".")
        by_block.setdefault(block, {})[rest] = weight
    for name, module in model.named_children():
        data = torch.func.functional_call(module, by_block.get(name, {}), (data,))
        yield name, module, data


def invariant(features: Tensor, irreps: Any) -> Tensor:
    """Return the columns of features of e3nn irreps that are scalars (0e)."""
    slices = zip(irreps, irreps.slices(), strict=True)
    return torch.cat([features[:, s] for (_, ir), s in slices if str(ir) == "0e"], 1)


class Backend(ABC):
    """A loaded foundation model of one family, frozen and never modified.

    Class attributes are what is known without importing the vendor; instances are
    made by `load`.
    """

    name: ClassVar[str]
    #: Module that must be importable, and the extra that installs it.
    vendor: ClassVar[str]
    #: File suffixes of the family's checkpoints.
    suffixes: ClassVar[tuple[str, ...]]
    #: Accelerated kernels of the vendor's calculator -> package they need.
    accelerators: ClassVar[Mapping[str, str]] = {}

    model_name: str
    model: nn.Module
    dtype: torch.dtype
    device: torch.device
    #: Active head (modality), or None for a model without heads.
    head: str | None
    #: Chemical symbols the model knows, in the order of its element table.
    elements: tuple[str, ...]
    properties: frozenset[Property]
    r_max: float
    #: Whether the file format holds a reference energy for each element.
    has_shift_by_element: bool
    #: Whether the model is symmetric under inversion (O(3)), or SO(3) only.
    has_inversion: bool
    _training_model: nn.Module | None = None

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the vendor's package can be imported."""
        return importlib.util.find_spec(cls.vendor) is not None

    @classmethod
    @abstractmethod
    def models(cls) -> list[ModelInfo]:
        """List the released models, without importing the vendor."""

    @classmethod
    @abstractmethod
    def knows(cls, model: str) -> bool:
        """Whether `model` is a released name of this family (aliases included)."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        head: str | None = None,
        trust_checkpoint: bool = False,
    ) -> Backend:
        """Load a released model by name, or a checkpoint by path."""

    @abstractmethod
    def graph(self, atoms: Atoms) -> Any:
        """Build the vendor's graph of one structure, in this model's precision.

        On the CPU, whatever the model's device: worker processes build graphs too.
        """

    def n_edges(self, graph: Any) -> int:
        """Return the number of directed edges; time and memory grow with it."""
        return int(graph["edge_index"].shape[1])

    @abstractmethod
    def batch(self, graphs: Sequence[Any]) -> Any:
        """Collate graphs of `graph` into one input of `predict`."""

    @abstractmethod
    def predict(
        self,
        batch: Any,
        weights: Mapping[str, Tensor],
        properties: Collection[Property],
        *,
        training: bool = False,
    ) -> dict[Property, Tensor]:
        """Predict with some parameters replaced.

        Parameters
        ----------
        batch
            From `batch`; not modified.
        weights
            Parameter name -> tensor in place of the base's; {} is the base.
        properties
            Which to compute.
        training
            Keep the graph, so that a loss on forces can be differentiated.

        Returns
        -------
        dict
            energy (n_structures,) eV; forces (n_atoms_total, 3) eV/Å;
            stress (n_structures, 6) eV/Å^3, ASE sign and Voigt order.
        """

    def features(
        self, batch: Any, weights: Mapping[str, Tensor], *, training: bool = False
    ) -> Features:
        """Return what new layers on top of the model are made of.

        Parameters
        ----------
        batch, weights, training
            See `predict`.

        Raises
        ------
        UsageError
            If the family does not expose its node features.
        """
        raise UsageError(
            f"{self.name} does not expose node features, which a spin layer needs; "
            "use a model of another family"
        )

    def rewritten(self) -> nn.Module | None:
        """Return a copy of the model whose layers are rewritten for training.

        It has the same parameters and the same predictions up to rounding; see
        `pathtune.layers`. None where the family has no such model.
        """
        return None

    @property
    def training_model(self) -> nn.Module:
        """The model that predicts with ``training=True``; `model` unless replaced."""
        return self.model if self._training_model is None else self._training_model

    @training_model.setter
    def training_model(self, model: nn.Module | None) -> None:
        self._training_model = model

    @abstractmethod
    def path_weights(self) -> list[PathWeight]:
        """Classify every parameter of the model, each exactly once."""

    @abstractmethod
    def stored_weights(self) -> Mapping[str, Tensor]:
        """Every named parameter in the vendor's stored dtype, on the CPU."""

    @abstractmethod
    def reference_energies(self) -> dict[str, float]:
        """Energy (eV) the model adds per atom of an element, for the active head."""

    @abstractmethod
    def save(
        self, path: Path, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write the vendor's own format.

        Parameters
        ----------
        path
            File to write.
        weights
            Merged parameters in the stored dtype; the others are the base's.
        shifts
            Element -> shift of the reference energy (eV), active head.
        """

    @abstractmethod
    def calculator(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Calculator:
        """Return the vendor's ASE calculator with merged weights and shifts."""

    def accelerated(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float], name: str
    ) -> Calculator:
        """Return the vendor's calculator with one of `accelerators`."""
        raise NotImplementedError(f"{self.name} has no accelerator {name!r}")

    def reload(self, path: Path) -> Backend:
        """Load a checkpoint that `save` wrote, with this model's settings."""
        return type(self).load(
            str(path), dtype=self.dtype, device=str(self.device), head=self.head
        )

    @property
    def total_parameters(self) -> int:
        """Number of elements of all named parameters."""
        return sum(p.numel() for p in self.model.parameters())


def instruction_paths(
    module: nn.Module, element_axis: int | None = None
) -> tuple[IrrepsPath, ...]:
    """Return the paths of an e3nn layer, in the order of its flat weight.

    Parameters
    ----------
    module
        An ``o3.Linear``, whose blocks are (mul_in, mul_out), or an ``o3.TensorProduct``
        with internal weights; for a fully connected one the blocks are (mul_1, mul_2,
        mul_out), and `Path.irrep_in` is that of the first input.
    element_axis
        Axis of each block that runs over the element table.
    """
    layer: Any = module
    is_linear = hasattr(layer, "irreps_in")
    irreps_in = layer.irreps_in if is_linear else layer.irreps_in1
    paths = []
    start = 0
    for instruction in layer.instructions:
        i_in = instruction.i_in if is_linear else instruction.i_in1
        has_weight = i_in >= 0 if is_linear else instruction.has_weight
        if not has_weight:
            continue
        shape = tuple(instruction.path_shape)
        stop = start + int(np.prod(shape))
        paths.append(
            IrrepsPath(
                start,
                stop,
                shape,
                str(irreps_in[i_in].ir),
                str(layer.irreps_out[instruction.i_out].ir),
                element_axis=element_axis,
                block_in=i_in,
                block_out=instruction.i_out,
            )
        )
        start = stop
    return tuple(paths)


def require_elements(backend: Backend, symbols: Collection[str]) -> None:
    """Refuse elements the model does not know.

    Raises
    ------
    PathtuneError
        If a symbol is not in the model's element table.
    """
    missing = sorted(set(symbols) - set(backend.elements))
    if missing:
        raise PathtuneError(
            f"{backend.model_name} does not know {', '.join(missing)}; it was trained "
            f"on {len(backend.elements)} elements. Choose a model that covers them"
        )


def pick_head(given: str | None, heads: Sequence[str], model: str) -> str | None:
    """Return the head to use; a model with several heads needs one to be named.

    Raises
    ------
    UsageError
        If a head is missing, unknown, or given for a model without heads.
    """
    if not heads:
        if given is not None:
            raise UsageError(f"{model} has no heads; leave out --head {given}")
        return None
    if given is None:
        raise UsageError(f"{model} has several heads: choose --head {'|'.join(heads)}")
    if given not in heads:
        raise UsageError(unknown("head", given, heads))
    return given
