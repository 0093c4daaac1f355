"""A foundation model with a spin layer on top, as a backend like any other.

The spins of a structure are the initial magnetic moments of its Atoms object: vectors,
or scalars along z. The energy is a function of positions and of these spins; magnetic
forces are its derivative with respect to them at fixed positions. They are what
constrained-moment DFT calls -dE/dm where the spins are the moments of that calculation,
which is what a training frame without initial moments of its own has to bring.

A structure without spins has no exchange energy and moments of zero. It cannot be
otherwise: the base does not change under time reversal, so it cannot tell up from
down, and ferro- and antiferromagnetic order of one lattice are the same input.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pathtune.backends.base import Backend, Features, ModelInfo
from pathtune.errors import PathtuneError, UsageError
from pathtune.paths import PathWeight
from pathtune.properties import Property, moment_vectors
from pathtune.spin.config import LARGEST_R_MAX, SpinConfig
from pathtune.spin.layer import Exchange, SpinLayer

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

#: What the names of the layer's parameters begin with.
PREFIX = "spin."

# What the base's class and the loaded base say of themselves.
_KNOWN_OF_CLASS = ("name", "vendor", "suffixes")
_KNOWN_OF_MODEL = (
    *("model_name", "model", "dtype", "device", "head", "elements", "r_max"),
    *("has_shift_by_element", "has_inversion"),
)


class SpinGraph(NamedTuple):
    """The base's graph or batch, with the spins of its atoms, (n_atoms, 3) μ_B."""

    base: Any
    spins: Tensor


class SpinBackend(Backend):
    """Base and spin layer; the layer's parameters are inputs, as the base's are.

    Parameters
    ----------
    base
        A backend that exposes node features.
    config
        The layer's settings.
    seed
        Of the layer's initial parameters.

    Raises
    ------
    UsageError
        If the base exposes no node features, or the layer's cutoff exceeds the base's.
    """

    name: ClassVar[str] = "spin"
    vendor: ClassVar[str] = "torch"
    suffixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: Backend, config: SpinConfig, seed: int = 0) -> None:
        self.base, self.config, self.seed = base, config, seed
        # To the rest of the package this is the base: the family is not another one.
        for name in (*_KNOWN_OF_CLASS, *_KNOWN_OF_MODEL):
            setattr(self, name, getattr(base, name))
        r_max = config.r_max or min(base.r_max, LARGEST_R_MAX)
        if r_max > base.r_max:
            raise UsageError(
                f"spin.r_max = {r_max:g} Å, but {base.model_name} has edges up to "
                f"{base.r_max:g} Å only; give a smaller one"
            )
        new: set[Property] = (
            {"magmoms"}
            if config.spins == "none"
            else {
                "magmoms",
                "magforces",
            }
        )
        self.properties = base.properties | new
        layer = SpinLayer(config, self._n_scalars(), r_max, seed)
        layer.requires_grad_(False).to(base.device, base.dtype)
        self.layer = layer

    def _n_scalars(self) -> int:
        from ase import Atoms

        symbol = self.base.elements[0]
        pair = Atoms([symbol] * 2, [[0, 0, 0], [0, 0, 1.5]], cell=[9, 9, 9], pbc=True)
        batch = self.base.batch([self.base.graph(pair)])
        return self.base.features(batch, {}).scalars.shape[1]

    @property
    def new_parameters(self) -> int:
        """Number of the layer's parameters."""
        return sum(p.numel() for p in self.layer.parameters())

    @property
    def total_parameters(self) -> int:
        """Number of elements of all parameters, the layer's included."""
        return self.base.total_parameters + self.new_parameters

    def spin_parameters(self) -> dict[str, Tensor]:
        """Return the layer's initial parameters; names begin with ``spin.``."""
        return {PREFIX + n: p.detach() for n, p in self.layer.named_parameters()}

    def graph(self, atoms: Atoms) -> SpinGraph:
        """Build the base's graph; the spins are the initial moments, zero without."""
        return SpinGraph(self.base.graph(atoms), spins_of(atoms).to(self.dtype))

    def n_edges(self, graph: SpinGraph) -> int:
        """Return the number of directed edges of the base's graph."""
        return self.base.n_edges(graph.base)

    def batch(self, graphs: Sequence[SpinGraph]) -> SpinGraph:
        """Collate graphs."""
        spins = torch.cat([graph.spins for graph in graphs]).to(self.device)
        return SpinGraph(self.base.batch([graph.base for graph in graphs]), spins)

    def predict(
        self,
        batch: SpinGraph,
        weights: Mapping[str, Tensor],
        properties: Collection[Property],
        *,
        training: bool = False,
    ) -> dict[Property, Tensor]:
        """Predict with base and layer; see the contract.

        Parameters
        ----------
        batch, properties, training
            See the contract.
        weights
            Of the base, and of the layer under ``spin.``.

        Returns
        -------
        dict
            As in the contract; magmoms (n_atoms_total, 3) μ_B, or magnitudes
            (n_atoms_total,) with ``spins: none``; magforces (n_atoms_total, 3) eV/μ_B.
        """
        features, layer = self._features(batch, weights, training)
        spins = batch.spins.detach().requires_grad_("magforces" in properties)
        with torch.enable_grad():
            added = torch.func.functional_call(self.layer, layer, (features, spins))
            energy = features.energy + added.energy
            has_forces = not {"forces", "stress"}.isdisjoint(properties)
            inputs = [features.leaf] if has_forces else []
            if "magforces" in properties:
                inputs.append(spins)
            slopes = (
                torch.autograd.grad(
                    energy.sum(),
                    inputs,
                    create_graph=training,
                    allow_unused=True,
                    materialize_grads=True,
                )
                if inputs
                else ()
            )
            predicted: dict[Property, Tensor] = {"energy": energy}
            if has_forces:
                forces, stress = features.forces_and_stress(slopes[0])
                predicted |= {"forces": forces, "stress": stress}
            predicted["magmoms"] = added.moments
            if "magforces" in properties:
                predicted["magforces"] = -slopes[-1]
        wanted = {n: value for n, value in predicted.items() if n in properties}
        if not training:
            wanted = {name: value.detach() for name, value in wanted.items()}
        return wanted

    def _features(
        self, batch: SpinGraph, weights: Mapping[str, Tensor], training: bool
    ) -> tuple[Features, dict[str, Tensor]]:
        """Return the base's features, and the weights that are the layer's."""
        rest, layer = split_weights(weights)
        return self.base.features(batch.base, rest, training=training), layer

    def landscape(
        self, atoms: Atoms, weights: Mapping[str, Tensor]
    ) -> tuple[Features, SpinLayer]:
        """Return the features of one structure, and the layer with its weights.

        With these the energy of any spins at fixed positions is a call of the layer.
        The features are not differentiable any more.
        """
        features, layer = self._features(
            self.batch([self.graph(atoms)]), weights, False
        )
        trained = copy.deepcopy(self.layer)
        trained.load_state_dict(layer, strict=False)
        return features.detached(), trained

    def exchange(self, atoms: Atoms, weights: Mapping[str, Tensor]) -> Exchange:
        """Return the couplings of all pairs of a structure; see `Exchange`.

        Raises
        ------
        UsageError
            With ``spins: none``, where there are none.
        """
        if self.config.spins == "none":
            raise UsageError("a layer with spins: none has no exchange couplings")
        features, layer = self.landscape(atoms, weights)
        spins = spins_of(atoms).to(self.device, self.dtype)
        return Exchange(*(value.detach() for value in layer.exchange(features, spins)))

    def rewritten(self) -> nn.Module | None:
        """Return the base's."""
        return self.base.rewritten()

    @property
    def training_model(self) -> nn.Module:
        """The base's."""
        return self.base.training_model

    @training_model.setter
    def training_model(self, model: nn.Module | None) -> None:
        self.base.training_model = model

    def path_weights(self) -> list[PathWeight]:
        """Return the base's; the layer has no paths."""
        return self.base.path_weights()

    def stored_weights(self) -> Mapping[str, Tensor]:
        """Return the base's; the layer's are `spin_parameters`."""
        return self.base.stored_weights()

    def reference_energies(self) -> dict[str, float]:
        """Return the base's."""
        return self.base.reference_energies()

    def save(
        self, path: Path, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write the base in its own format, which cannot hold the layer."""
        self.base.save(path, split_weights(weights)[0], shifts)

    def reload(self, path: Path) -> SpinBackend:
        """Put the same layer on a checkpoint that `save` wrote."""
        return SpinBackend(self.base.reload(path), self.config, self.seed)

    def calculator(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Calculator:
        """Return an ASE calculator with magnetic moments and forces."""
        from pathtune.spin.calculator import SpinCalculator

        return SpinCalculator(self, weights, shifts)

    @classmethod
    def models(cls) -> list[ModelInfo]:
        """Return nothing: layers are put on models of other families."""
        return []

    @classmethod
    def knows(cls, model: str) -> bool:
        """Return False: layers are put on models of other families."""
        return False

    @classmethod
    def load(cls, model: str, **options: Any) -> Backend:
        """Refuse: a layer needs a loaded base."""
        raise NotImplementedError("SpinBackend(base, config) puts a layer on a base")


def split_weights(
    weights: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the base's weights, and the layer's without their prefix."""
    base = {n: w for n, w in weights.items() if not n.startswith(PREFIX)}
    layer = {
        n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)
    }
    return base, layer


def spins_of(atoms: Atoms) -> Tensor:
    """Return the initial magnetic moments as vectors, (n_atoms, 3) μ_B, float64.

    Raises
    ------
    PathtuneError
        If one of them is not a number.
    """
    spins = moment_vectors(atoms.get_initial_magnetic_moments())
    if not np.isfinite(spins).all():
        raise PathtuneError(
            "an initial magnetic moment is not finite; give every atom a number or a "
            "vector (0 for an atom without a moment)"
        )
    return torch.from_numpy(np.ascontiguousarray(spins, dtype=float))
