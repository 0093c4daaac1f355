"""A base model without energy: what tests put a spin layer on, without any vendor."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from ase.neighborlist import neighbor_list
from torch import Tensor

from pathtune.backends.base import Backend, Features


class LatticeGraph(NamedTuple):
    """Atoms and edges of one or several structures."""

    positions: Tensor
    species: Tensor
    structure: Tensor
    pairs: Tensor
    #: Of the cell, added to the second atom (Å).
    shifts: Tensor
    volumes: Tensor


class LatticeBackend(Backend):
    """Energy zero; the features of an atom are its species and its neighbourhood."""

    name: ClassVar[str] = "lattice"
    vendor: ClassVar[str] = "torch"
    suffixes: ClassVar[tuple[str, ...]] = ()
    model_name = "lattice"
    head = None
    elements = ("O", "Fe")
    properties = frozenset(("energy", "forces", "stress"))
    has_shift_by_element = True
    has_inversion = True

    def __init__(self, r_max: float = 4.0, dtype: torch.dtype = torch.float64) -> None:
        self.r_max, self.dtype, self.device = r_max, dtype, torch.device("cpu")
        self.model = torch.nn.Module()

    def graph(self, atoms: Any) -> LatticeGraph:
        i, j, shifts = neighbor_list("ijS", atoms, self.r_max)
        volume = atoms.get_volume() if atoms.cell.rank == 3 else 1.0
        return LatticeGraph(
            torch.tensor(atoms.positions, dtype=self.dtype),
            torch.tensor([self.elements.index(s) for s in atoms.symbols]),
            torch.zeros(len(atoms), dtype=torch.long),
            torch.stack([torch.from_numpy(i), torch.from_numpy(j)]),
            torch.tensor(shifts @ atoms.cell.array, dtype=self.dtype),
            torch.tensor([volume], dtype=self.dtype),
        )

    def n_edges(self, graph: LatticeGraph) -> int:
        return graph.pairs.shape[1]

    def batch(self, graphs: Any) -> LatticeGraph:
        sizes = torch.tensor([0, *(len(g.positions) for g in graphs)]).cumsum(0)
        return LatticeGraph(
            torch.cat([g.positions for g in graphs]),
            torch.cat([g.species for g in graphs]),
            torch.cat([g.structure + n for n, g in enumerate(graphs)]),
            torch.cat(
                [g.pairs + n for n, g in zip(sizes[:-1], graphs, strict=True)], 1
            ),
            torch.cat([g.shifts for g in graphs]),
            torch.cat([g.volumes for g in graphs]),
        )

    def features(
        self, batch: LatticeGraph, weights: Any, *, training: bool = False
    ) -> Features:
        i, j = batch.pairs
        vectors = batch.positions[j] - batch.positions[i] + batch.shifts
        vectors.requires_grad_()
        with torch.enable_grad():
            x = (vectors.norm(dim=1) / self.r_max).unsqueeze(1)
            radial = (1 - x**2) ** 3 * torch.cat([1 + 0 * x, x, x**2], 1)
            around = radial.new_zeros(len(batch.species), 3).index_add(0, i, radial)
            species = torch.nn.functional.one_hot(batch.species, 2).to(self.dtype)
            scalars = torch.cat([species, around], 1)
            energy = torch.zeros(len(batch.volumes), dtype=self.dtype)
            energy = energy.index_add(0, batch.structure, 0 * around.sum(1))
        return Features(
            energy=energy,
            scalars=scalars,
            pairs=batch.pairs,
            vectors=vectors,
            structure=batch.structure,
            volumes=batch.volumes,
            leaf=vectors,
        )

    def predict(self, batch, weights, properties, *, training=False):
        n, zeros = len(batch.volumes), torch.zeros_like(batch.positions)
        known = {
            "energy": torch.zeros(n, dtype=self.dtype),
            "forces": zeros,
            "stress": torch.zeros(n, 6, dtype=self.dtype),
        }
        return {name: known[name] for name in properties}

    def path_weights(self):
        return []

    def stored_weights(self):
        return {}

    def reference_energies(self):
        return dict.fromkeys(self.elements, 0.0)

    def save(self, path, weights, shifts):
        raise NotImplementedError

    def calculator(self, weights, shifts):
        raise NotImplementedError

    @classmethod
    def models(cls):
        return []

    @classmethod
    def knows(cls, model):
        return False

    @classmethod
    def load(cls, model, **options):
        raise NotImplementedError
