"""CHGNet (Deng et al. 2023): checkpoints, graphs, path weights, composition energies.

CHGNet works on distances and angles: all its features are scalars (0e), so every
linear layer is one path of degree 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pathtune import files, trust
from pathtune.backends.base import Backend as Contract
from pathtune.backends.base import ModelInfo, pick_head, reading, undisturbed
from pathtune.errors import PathtuneError, UsageError
from pathtune.paths import Kind, PathWeight, Role
from pathtune.paths import Path as IrrepsPath
from pathtune.properties import PROPERTIES, Property

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator


# Name -> (file below the vendor's folder of pre-trained models, SHA-256).
_BUNDLED: Mapping[str, tuple[str, str]] = {
    "chgnet-0.3.0": (
        "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
        "d14ab7c0f093efe64b60a7bcd540bca10e74fb7f46c86108a079af60524659d1",
    ),
    "chgnet-r2scan": (
        "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
        "8eba3db0f35a2788bb3ae22885ad340591e27996f213c6643af522a633b50dad",
    ),
    "chgnet-0.2.0": (
        "0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar",
        "ef624f78b6db9d315b4ef256f1bb3207449924191b91720dc17d3f60c5df980e",
    ),
}
_ALIASES = {"chgnet": "chgnet-0.3.0"}
_RELEASED = frozenset(digest for _, digest in _BUNDLED.values())
_SHIFT = "composition_model.fc.weight"


def _vendor_folder() -> Path | None:
    spec = importlib.util.find_spec("chgnet")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pretrained"


def _canonical(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


@contextlib.contextmanager
def _vendor_code() -> Iterator[None]:
    """Run vendor code: it draws random numbers, warns, and prints to the console."""
    with undisturbed(torch.float32), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, eq=False)
class _Graph:
    """One structure or several, as plain tensors; E directed edges, A angles.

    Parameters
    ----------
    numbers
        (n_atoms,) atomic numbers.
    positions
        (n_atoms, 3) Å.
    n_atoms, volume
        (n_structures,) atoms and volume (Å^3) of each structure.
    edges, shift
        (E, 2) centre and neighbour; (E, 3) lattice vector to the neighbour's image, Å.
    directed_to_undirected, undirected_to_directed
        (E,) and (E/2,).
    angles
        (A, 5) centre, then undirected and directed index of each of the two bonds.
    """

    numbers: Tensor
    positions: Tensor
    n_atoms: Tensor
    volume: Tensor
    edges: Tensor
    shift: Tensor
    directed_to_undirected: Tensor
    undirected_to_directed: Tensor
    angles: Tensor

    def offset(self, atoms: int, bonds: int) -> _Graph:
        """Return the graph behind `atoms` atoms and `bonds` undirected bonds."""
        columns = torch.tensor([atoms, bonds, 2 * bonds, bonds, 2 * bonds])
        return replace(
            self,
            edges=self.edges + atoms,
            directed_to_undirected=self.directed_to_undirected + bonds,
            undirected_to_directed=self.undirected_to_directed + 2 * bonds,
            angles=self.angles + columns,
        )

    def to(self, device: torch.device) -> _Graph:
        """Move all tensors."""
        return _Graph(*(getattr(self, f.name).to(device) for f in fields(self)))


def _collate(graphs: Sequence[_Graph]) -> _Graph:
    """Concatenate graphs."""
    atoms = [0, *accumulate(len(g.numbers) for g in graphs)]
    bonds = [0, *accumulate(len(g.undirected_to_directed) for g in graphs)]
    moved = [g.offset(a, b) for g, a, b in zip(graphs, atoms, bonds, strict=False)]
    names = [f.name for f in fields(_Graph)]
    return _Graph(*(torch.cat([getattr(g, n) for g in moved]) for n in names))


class _Potential(nn.Module):
    """The vendor's layers behind one differentiable set of bond vectors.

    The vendor expands the bonds structure by structure, differentiates once for the
    forces and again for the stress, and always keeps the graph for a second
    derivative. Here a batch is expanded at once and differentiated once.
    """

    def __init__(self, chgnet: Any) -> None:
        super().__init__()
        self.chgnet = chgnet

    def forward(
        self, graph: _Graph, wanted: Collection[Property], training: bool
    ) -> dict[Property, Tensor]:
        """Predict, total energies; see `Backend.predict`."""
        n = len(graph.n_atoms)
        owners = torch.repeat_interleave(graph.n_atoms)
        inputs = {"forces": graph.positions.clone().requires_grad_("forces" in wanted)}
        positions = inputs["forces"]
        centre, neighbour = graph.edges.unbind(1)
        neighbours = positions.index_select(0, neighbour) + graph.shift
        bonds = positions.index_select(0, centre) - neighbours
        if "stress" in wanted:
            inputs["stress"] = bonds.new_zeros((n, 3, 3), requires_grad=True)
            strain = inputs["stress"].index_select(0, owners[centre])
            bonds = bonds + torch.einsum("ei,eij->ej", bonds, strain)
        energy, magmoms = self._energy(graph, owners, bonds, "magmoms" in wanted)
        predicted: dict[Property, Tensor] = {"energy": energy}
        if magmoms is not None:
            predicted["magmoms"] = magmoms
        sought = {name: x for name, x in inputs.items() if name in wanted}
        if sought:
            found = torch.autograd.grad(
                energy.sum(), list(sought.values()), create_graph=training
            )
            slopes = dict(zip(sought, found, strict=True))
            if "forces" in slopes:
                predicted["forces"] = -slopes["forces"]
            if "stress" in slopes:
                full = slopes["stress"] / graph.volume[:, None, None]
                full = (full + full.mT) / 2
                predicted["stress"] = full.flatten(1)[:, [0, 4, 8, 5, 2, 1]]
        return {name: predicted[name] for name in PROPERTIES if name in wanted}

    def _energy(
        self, graph: _Graph, owners: Tensor, bonds: Tensor, with_magmoms: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return total energies (eV) and moments (μ_B) from the bond vectors (Å)."""
        from chgnet.model.model import BatchedGraph

        model = self.chgnet
        lengths = bonds.norm(dim=1)
        directions = bonds / lengths[:, None]
        undirected = lengths.index_select(0, graph.undirected_to_directed)
        radial = model.bond_basis_expansion
        first = directions.index_select(0, graph.angles[:, 2])
        second = directions.index_select(0, graph.angles[:, 4])
        batched = BatchedGraph(
            atomic_numbers=graph.numbers,
            bond_bases_ag=radial.rbf_expansion_ag(undirected),
            bond_bases_bg=radial.rbf_expansion_bg(undirected),
            angle_bases=model.angle_basis_expansion(first, second),
            batched_atom_graph=graph.edges,
            batched_bond_graph=graph.angles[:, [0, 1, 3]],
            atom_owners=owners,
            directed2undirected=graph.directed_to_undirected,
            atom_positions=[],
            strains=[],
            volumes=[],
        )
        out = model._compute(batched, compute_magmom=with_magmoms)
        energy = out["e"] * graph.n_atoms if model.is_intensive else out["e"]
        if model.composition_model is not None:
            reference = model.composition_model.fc.weight[0, graph.numbers - 1]
            energy = energy.index_add(0, owners, reference)
        return energy, torch.cat(out["m"]) if with_magmoms else None


class Backend(Contract):
    """A CHGNet checkpoint.

    In float64 positions, cells and weights are double; the vendor's converter, which
    rounds them, then decides about neighbours only. The vendor's single-precision
    constant in front of the angles' lowest term, 1/sqrt(2), stays as it is.
    """

    name: ClassVar[str] = "chgnet"
    vendor: ClassVar[str] = "chgnet"
    suffixes: ClassVar[tuple[str, ...]] = (".pth.tar",)
    properties: frozenset[Property] = frozenset(
        ("energy", "forces", "stress", "magmoms")
    )
    # Distances and angles do not change under inversion.
    has_inversion = True

    _content: dict[str, Any]
    _converter: Any
    _potential: _Potential
    _stored: dict[str, Tensor]
    model: Any

    @classmethod
    def models(cls) -> list[ModelInfo]:
        """List the released models; which file of the vendor's each name means."""
        folder = _vendor_folder()
        infos = []
        for name, (file, digest) in _BUNDLED.items():
            there = folder is not None and (folder / file).is_file()
            reason = "in the vendor's package"
            if folder is None:
                reason = "not installed: pip install 'pathtune[chgnet]'"
            elif not there:
                reason = "not in the installed chgnet"
            what = f"{file} (sha256 {digest[:12]})"
            # They are part of the package, and under its licence.
            licence = "BSD-3-Clause-LBNL"
            infos.append(
                ModelInfo(cls.name, name, there, reason, what, licence=licence)
            )
        return infos

    @classmethod
    def knows(cls, model: str) -> bool:
        """Whether `model` is a released CHGNet name."""
        return _canonical(model) in _BUNDLED

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        head: str | None = None,
        trust_checkpoint: bool = False,
    ) -> Backend:
        """Load a released CHGNet by name, or a ``.pth.tar`` checkpoint.

        Parameters
        ----------
        model
            ``chgnet-0.3.0`` (also ``chgnet``), ``chgnet-r2scan``, ``chgnet-0.2.0`` or
            a file.
        dtype
            torch.float32 (the vendor's precision) or torch.float64.
        device
            PyTorch device.
        head
            Must be None: CHGNet has no heads.
        trust_checkpoint
            Open a pickled file of unknown hash, and remember it.

        Raises
        ------
        PathtuneError
            If the file is missing, unreadable, no CHGNet checkpoint, or not trusted.
        UsageError
            If a head is given.
        """
        path, name = Path(model), Path(model).name
        version = None
        if cls.knows(model):
            name = _canonical(model)
            folder = _vendor_folder()
            assert folder is not None, "the vendor is installed"
            path = folder / _BUNDLED[name][0]
            version = name.removeprefix("chgnet-")
        trust.require(path, _RELEASED, trust=trust_checkpoint)
        self = cls()
        self.model_name = name
        self.head = pick_head(head, (), name)
        self.dtype = dtype
        self.device = torch.device(device)
        with reading(path, "a CHGNet checkpoint"):
            self._content = _read(path, version)
            single = self._built()
        composition = single.composition_model
        if composition is not None and not (
            hasattr(composition, "fc")
            and composition.is_intensive == single.is_intensive
        ):
            raise PathtuneError(
                f"{path}: its composition model is no energy per element "
                "(AtomRef) in the units of the model, which is all pathtune supports"
            )
        self._stored = {n: p.detach().clone() for n, p in single.named_parameters()}
        self.model = single.to(self.device, dtype).eval().requires_grad_(False)
        self._converter = single.graph_converter
        self._potential = _Potential(self.model)
        self.elements = _symbols(single.atom_embedding.embedding.num_embeddings)
        self.r_max = float(self._converter.atom_graph_cutoff)
        self.has_shift_by_element = composition is not None
        return self

    def _built(self) -> Any:
        """Build the vendor's model in float32."""
        with _vendor_code():
            from chgnet.model import CHGNet

            model = CHGNet.from_dict(self._content)
            # An atom without neighbours has the energy of its embedding; the vendor's
            # calculator takes it too, with a warning.
            model.graph_converter.set_isolated_atom_response("ignore")
            return model

    def graph(self, atoms: Atoms) -> _Graph:
        """Build the vendor's graph of one structure.

        The vendor's own neighbour list honours directions that are not periodic, so a
        molecule needs no vacuum around it; missing cell vectors are completed by unit
        vectors, along which nothing repeats.
        """
        from pymatgen.core import Lattice, Structure

        cell = atoms.cell.complete()
        a, b, c = map(bool, atoms.pbc)
        found = self._converter(
            Structure(
                Lattice(cell[:], pbc=(a, b, c)),
                atoms.get_chemical_symbols(),
                atoms.positions,
                coords_are_cartesian=True,
            )
        )
        if self.dtype == torch.float32:
            # Rounded as the vendor rounds: fractional coordinates first.
            lattice = found.lattice.detach()
            positions = found.atom_frac_coord.detach() @ lattice
        else:
            lattice = torch.tensor(cell[:], dtype=self.dtype)
            positions = torch.tensor(atoms.positions, dtype=self.dtype)
        return _Graph(
            numbers=found.atomic_number.long(),
            positions=positions,
            n_atoms=torch.tensor([len(atoms)]),
            # The vendor's volume is negative for a left-handed cell, and so is its
            # stress then.
            volume=lattice.det().abs().view(1),
            edges=found.atom_graph.long().view(-1, 2),
            shift=found.neighbor_image.to(self.dtype).view(-1, 3) @ lattice,
            directed_to_undirected=found.directed2undirected.long(),
            undirected_to_directed=found.undirected2directed.long(),
            angles=found.bond_graph.long().view(-1, 5),
        )

    def n_edges(self, graph: _Graph) -> int:
        """Return the number of directed edges of the atom graph."""
        return len(graph.edges)

    def batch(self, graphs: Sequence[_Graph]) -> list[tuple[list[int], _Graph]]:
        """Collate graphs.

        The vendor leaves out the layers of the angles where a whole batch has no
        angle. With a bias behind these layers (version 0.2.0) that changes the energy,
        so such a model gets structures with and without angles apart.
        """
        groups = [list(range(len(graphs)))]
        if self._content["model_args"]["mlp_out_bias"]:
            groups = [
                [i for i, g in enumerate(graphs) if bool(len(g.angles)) == has_angles]
                for has_angles in (True, False)
            ]
        return [
            (rows, _collate([graphs[i] for i in rows]).to(self.device))
            for rows in groups
            if rows
        ]

    def predict(
        self,
        batch: Any,
        weights: Mapping[str, Tensor],
        properties: Collection[Property],
        *,
        training: bool = False,
    ) -> dict[Property, Tensor]:
        """Predict energy, forces, stress and moments; see the contract.

        Moments are magnitudes, shape (n_atoms_total,), μ_B.
        """
        named = {f"chgnet.{name}": tensor for name, tensor in weights.items()}
        parts = []
        with torch.enable_grad():  # forces are a derivative also in evaluation
            for _, graph in batch:
                arguments = (graph, properties, training)
                parts.append(
                    torch.func.functional_call(self._potential, named, arguments)
                )
        predicted = parts[0] if len(parts) == 1 else _interleave(batch, parts)
        if not training:
            predicted = {name: value.detach() for name, value in predicted.items()}
        return predicted

    def path_weights(self) -> list[PathWeight]:
        """Classify every parameter; a linear weight is one path, stored as (out, in).

        Kind radial is what sees a distance alone; biases, normalisations and the
        frequencies of the angles are other.
        """
        modules = dict(self.model.named_modules())
        records = []
        for name, parameter in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            block, _, rest = name.partition(".")
            number = rest.partition(".")[0]
            layer = int(number) if block.endswith("_layers") else None
            shape = tuple(parameter.shape)
            kind = _kind(name, modules[owner])
            axis = {"atom_embedding": 0, "composition_model": 1}.get(block)
            path = IrrepsPath(0, parameter.numel(), shape, "0e", "0e", axis)
            records.append(
                PathWeight(
                    name=name,
                    shape=shape,
                    kind=kind,
                    role=_role(block),
                    layer=layer,
                    paths=(path,) if kind in ("linear", "scale_shift") else (),
                    elements=self.elements if axis is not None else (),
                    properties=self._reached(name, block, layer),
                    basis_axis=_basis_axis(name),
                )
            )
        return records

    def _reached(
        self, name: str, block: str, layer: int | None
    ) -> tuple[Property, ...]:
        """Return the properties that depend on a parameter.

        Moments are read before the last atom convolution; the last angle update is
        computed and never used; constants per atom cancel in derivatives.
        """
        n = len(self.model.atom_conv_layers)
        if block == "site_wise":
            return ("magmoms",)
        if (block, layer) == ("angle_layers", n - 2):
            return ()
        *_, last_bias = (f"mlp.{n}" for n, _ in self.model.mlp.named_parameters())
        if name in (_SHIFT, last_bias):
            return ("energy",)
        only_energy = {
            ("atom_conv_layers", n - 1),
            ("bond_conv_layers", n - 2),
            ("angle_layers", n - 3),
        }
        if (block, layer) in only_energy or block in ("readout_norm", "pooling", "mlp"):
            return ("energy", "forces", "stress")
        return PROPERTIES

    def stored_weights(self) -> Mapping[str, Tensor]:
        """Every named parameter as the checkpoint has it (float32, CPU)."""
        return self._stored

    def reference_energies(self) -> dict[str, float]:
        """Return the composition model's energy of each element (eV)."""
        if not self.has_shift_by_element:
            return dict.fromkeys(self.elements, 0.0)
        values = self._stored[_SHIFT][0].double().tolist()
        return dict(zip(self.elements, values, strict=True))

    def _merged_model(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Any:
        merged = {**self._stored, **weights}
        if any(shifts.values()):
            if not self.has_shift_by_element:
                raise PathtuneError(
                    f"{self.model_name} has no composition model and cannot hold "
                    "reference energies by element"
                )
            energies = merged[_SHIFT].double()
            for symbol, value in shifts.items():
                energies[0, self.elements.index(symbol)] += value
            merged[_SHIFT] = energies.to(self._stored[_SHIFT].dtype)
        model = self._built()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(merged[name])
        return model

    def save(
        self, path: Path, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write what the vendor's trainer writes and ``CHGNet.from_file`` reads.

        State of optimizer and scheduler, and the history of the base's training, are
        not those of this model and left out.
        """
        buffer = io.BytesIO()
        torch.save({"model": self._merged_model(weights, shifts).as_dict()}, buffer)
        files.write_bytes(path, buffer.getvalue())

    def calculator(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Calculator:
        """Return a CHGNetCalculator, in the vendor's float32.

        Like every CHGNetCalculator it needs a cell: put molecules in a box.
        """
        if self.dtype != torch.float32:
            raise UsageError("CHGNet's calculator works in float32: load with it")
        model = self._merged_model(weights, shifts)
        with _vendor_code():
            from chgnet.model import CHGNetCalculator

            return CHGNetCalculator(model, use_device=str(self.device))


def _read(path: Path, version: str | None) -> dict[str, Any]:
    """Return a checkpoint's ``state_dict`` and ``model_args``, completed."""
    with _vendor_code():
        content = torch.load(path, map_location="cpu", weights_only=False)["model"]
    arguments = dict(content["model_args"])
    # The released 0.2.0 does not say that it has these biases; the vendor's loader
    # knows it by name.
    biases = [k for k in content["state_dict"] if k.endswith("mlp_out.layers.1.bias")]
    arguments.setdefault("mlp_out_bias", bool(biases))
    if version is not None:
        arguments["version"] = version
    return {"state_dict": content["state_dict"], "model_args": arguments}


def _kind(name: str, module: Any) -> Kind:
    if name == _SHIFT:
        return "scale_shift"
    if ".rbf_expansion_" in name or name.startswith(("bond_embedding", "bond_weights")):
        return "radial"
    is_weight = name.endswith(".weight")
    if is_weight and isinstance(module, nn.Linear | nn.Embedding):
        return "linear"
    return "other"


def _basis_axis(name: str) -> int | None:
    if ".rbf_expansion_" in name:
        return 0
    return 1 if name.startswith(("bond_embedding", "bond_weights")) else None


def _role(block: str) -> Role:
    if block.endswith("_layers"):
        return "interaction"
    if block in ("composition_model", "site_wise", "readout_norm", "pooling", "mlp"):
        return "readout"
    return "embedding"


def _symbols(n: int) -> tuple[str, ...]:
    from ase.data import chemical_symbols

    return tuple(chemical_symbols[1 : n + 1])


def _interleave(
    batch: Sequence[tuple[Sequence[int], _Graph]],
    parts: Sequence[Mapping[Property, Tensor]],
) -> dict[Property, Tensor]:
    """Put what was predicted apart back into the order of the structures."""
    order = torch.tensor([row for rows, _ in batch for row in rows]).argsort()
    sizes = torch.cat([graph.n_atoms.cpu() for _, graph in batch]).tolist()
    predicted: dict[Property, Tensor] = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts])
        pieces = values.split(sizes if name in ("forces", "magmoms") else 1)
        predicted[name] = torch.cat([pieces[i] for i in order.tolist()])
    return predicted
