"""MACE (ACEsuit): models, graphs, path weights and atomic energies."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pathtune import files, layers, trust
from pathtune.backends.base import Backend as Contract
from pathtune.backends.base import (
    Features,
    ModelInfo,
    instruction_paths,
    invariant,
    pick_head,
    reading,
    undisturbed,
)
from pathtune.errors import PathtuneError
from pathtune.paths import Kind, PathWeight, Role
from pathtune.paths import Path as IrrepsPath
from pathtune.properties import PROPERTIES, Property

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator


# Name -> file of the release. The vendor's `mace_mp` knows the first group by the same
# names, its `mace_off` the second by the size alone.
_MATERIALS: Mapping[str, str] = {
    "small": "2023-12-10-mace-128-L0_energy_epoch-249.model",
    "medium": "2023-12-03-mace-128-L1_epoch-199.model",
    "large": "MACE_MPtrj_2022.9.model",
    "small-0b": "mace_agnesi_small.model",
    "medium-0b": "mace_agnesi_medium.model",
    "small-0b2": "mace-small-density-agnesi-stress.model",
    "medium-0b2": "mace-medium-density-agnesi-stress.model",
    "large-0b2": "mace-large-density-agnesi-stress.model",
    "medium-0b3": "mace-mp-0b3-medium.model",
    "medium-mpa-0": "mace-mpa-0-medium.model",
    "small-omat-0": "mace-omat-0-small.model",
    "medium-omat-0": "mace-omat-0-medium.model",
    "mace-matpes-pbe-0": "MACE-matpes-pbe-omat-ft.model",
    "mace-matpes-r2scan-0": "MACE-matpes-r2scan-omat-ft.model",
    "mh-0": "mace-mh-0.model",
    "mh-1": "mace-mh-1.model",
}
_SIZES = ("small", "medium", "large")
_ORGANIC: Mapping[str, str] = {
    f"mace-off23-{size}": f"MACE-OFF23_{size}.model" for size in _SIZES
}
_FILES: Mapping[str, str] = {**_MATERIALS, **_ORGANIC}
_ALIASES = {f"{size}_off": f"mace-off23-{size}" for size in _SIZES}
_HEADS: Mapping[str, tuple[str, ...]] = {
    "mh-1": (
        *("matpes_r2scan", "mp_pbe_refit_add", "spice_wB97M"),
        *("oc20_usemppbe", "omol", "omat_pbe"),
    )
}
# As the vendor announces them when they are downloaded.
_ACADEMIC = frozenset(
    {"small-omat-0", "medium-omat-0", "mace-matpes-pbe-0", "mace-matpes-r2scan-0"}
) | set(_ORGANIC)

# As the documentation of the vendor's loaders has it; mh-0 and mh-1 are not in there.
_LICENCES: Mapping[str, str] = {
    name: "Academic Software License" if name in _ACADEMIC else "MIT"
    for name in _FILES
    if name not in ("mh-0", "mh-1")
}

# What the model reads of the vendor's graph, besides embedded features.
_GRAPH_KEYS = frozenset(
    {"positions", "node_attrs", "edge_index", "shifts", "unit_shifts", "cell", "head"}
)
# Linear layers whose input is the one-hot element.
_FROM_ELEMENTS = ("node_embedding.linear", "source_embedding", "target_embedding")
_READOUTS = ("readouts.", "embedding_readout.")
# What has the radial basis functions along its first axis.
_FROM_BASIS = (
    "bessel_fn.bessel_weights",
    "conv_tp_weights.layer0.weight",
    "density_fn.layer0.weight",
)
_RADIAL_MODULES = frozenset({"radial_embedding", "conv_tp_weights", "density_fn"})


@contextlib.contextmanager
def _vendor(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Import or run MACE without a word on standard output, process left as it was.

    MACE prints while it is imported, and its first log message gives the root logger a
    handler.
    """
    handlers = logging.root.handlers.copy()
    try:
        with undisturbed(dtype), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            # e3nn 0.4.4 unpickles its constants while it is imported; torch >= 2.6
            # refuses that unless it is told to. MACE sets this only the first time.
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
            yield
    finally:
        logging.root.handlers[:] = handlers


def _canonical(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def _cached(name: str) -> Path:
    """Return the file in which the vendor's loader keeps a released model."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    file = _ORGANIC.get(name) or re.sub(r"\W", "", _MATERIALS[name])
    return Path(home) / "mace" / file


def _fetch(name: str) -> Path:
    """Let the vendor find or download a released model."""
    path = _cached(name)
    try:
        with _vendor():
            from mace.calculators import foundations_models as vendor

            if name in _MATERIALS:
                return Path(vendor.download_mace_mp_checkpoint(name))
            # `mace_off` unpickles what it has downloaded; trust comes in between.
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                url = vendor.mace_off_urls[name.rpartition("-")[2]]
                vendor._urlretrieve_with_timeout(url, str(path))
    except (OSError, RuntimeError) as error:
        raise PathtuneError(
            f"{name} has to be downloaded and that failed ({error}); download "
            f"{_FILES[name]} where there is a network and put it at {path}, or give "
            "the path of your copy in place of the name"
        ) from error
    return path


def _open(path: Path) -> Any:
    """Unpickle a trusted MACE energy model, on the CPU."""
    with _vendor():
        from mace.modules.models import MACE, ScaleShiftMACE

        with reading(path, "a MACE model"):
            model = torch.load(path, map_location="cpu", weights_only=False)
    if type(model) in (MACE, ScaleShiftMACE):
        return model
    if isinstance(model, torch.jit.ScriptModule):
        what = "a compiled model; give the file it was compiled from"
    else:
        what = (
            f"a {type(model).__name__}, not a model of energies (ScaleShiftMACE, MACE)"
        )
    raise PathtuneError(f"{path} holds {what}")


class Backend(Contract):
    """A MACE model of energies.

    In float64, coupling constants that the file has in float32 are computed again.
    """

    name: ClassVar[str] = "mace"
    vendor: ClassVar[str] = "mace"
    suffixes: ClassVar[tuple[str, ...]] = (".model",)
    accelerators: ClassVar[Mapping[str, str]] = {
        "cueq": "cuequivariance_torch",
        "oeq": "openequivariance",
    }
    properties: frozenset[Property] = frozenset({"energy", "forces", "stress"})
    has_shift_by_element: bool = True

    model: Any
    #: The model as the file has it: its precision, on the CPU.
    _original: Any
    #: All heads, the one of a model with a single head included.
    _all_heads: tuple[str, ...]
    _keys: frozenset[str]

    @classmethod
    def models(cls) -> list[ModelInfo]:
        """List the released models; which file each name means."""
        infos = []
        for name, file in _FILES.items():
            path = _cached(name)
            available = cls.is_installed() and path.is_file()
            if not cls.is_installed():
                reason = "not installed: pip install 'pathtune[mace]'"
            elif available:
                reason = f"in {path.parent}; once with --trust-checkpoint"
            else:
                reason = "downloaded by the vendor when used; once --trust-checkpoint"
            licence = _LICENCES.get(name, "")
            file += f" ({licence})" if name in _ACADEMIC else ""
            heads = _HEADS.get(name, ())
            infos.append(
                ModelInfo(cls.name, name, available, reason, file, heads, licence)
            )
        return infos

    @classmethod
    def knows(cls, model: str) -> bool:
        """Whether `model` is a released MACE name."""
        return _canonical(model) in _FILES

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
        """Load a released MACE by name, or a ``.model`` file.

        Parameters
        ----------
        model
            ``medium-mpa-0``, ``mace-off23-small``, ``mh-1``, ... or a file.
        dtype
            torch.float32 or torch.float64, whatever the file has.
        device
            PyTorch device.
        head
            Head of a model that has several.
        trust_checkpoint
            Open a pickled file of unknown hash, and remember it.

        Raises
        ------
        PathtuneError
            If the file is missing, cannot be downloaded, is no MACE model of energies,
            or is not trusted.
        UsageError
            If the head is missing or unknown.
        """
        released = cls.knows(model)
        path = _fetch(_canonical(model)) if released else Path(model)
        trust.require(path, frozenset(), trust=trust_checkpoint)
        self = cls()
        self._original = _open(path)
        self.model_name = _canonical(model) if released else path.name
        self._all_heads = tuple(getattr(self._original, "heads", None) or ("Default",))
        self.head = pick_head(head, self._heads, self.model_name)
        self.dtype = dtype
        self.device = torch.device(device)
        self.model = self._in_use(self._original)
        self.elements = _symbols(self._original.atomic_numbers)
        self.r_max = float(self._original.r_max)
        features = getattr(self._original, "embedding_specs", None) or ()
        self._keys = _GRAPH_KEYS.union(features)
        harmonics = self._original.spherical_harmonics.irreps_out
        self.has_inversion = all(ir.p == (-1) ** ir.l for _, ir in harmonics)
        return self

    @property
    def _heads(self) -> tuple[str, ...]:
        """The heads to choose from; none where there is one."""
        return self._all_heads if len(self._all_heads) > 1 else ()

    @property
    def _head_index(self) -> int:
        return 0 if self.head is None else self._heads.index(self.head)

    def _in_use(self, original: Any) -> Any:
        """Return a frozen copy in this backend's precision, on its device."""
        with _vendor():
            model = copy.deepcopy(original).to(self.dtype)
            stored = next(original.parameters()).dtype
            if (stored, self.dtype) == (torch.float32, torch.float64):
                _compute_couplings(model)
        return model.requires_grad_(False).eval().to(self.device)

    def graph(self, atoms: Atoms) -> Any:
        """Build the vendor's graph (its own neighbour list) of one structure."""
        from mace.data import AtomicData, KeySpecification, config_from_atoms
        from mace.tools.utils import AtomicNumberTable

        # The vendor's calculator looks for charge and spin under these names.
        keys = KeySpecification({"total_spin": "spin", "total_charge": "charge"}, {})
        table = AtomicNumberTable(self._original.atomic_numbers.tolist())
        heads = list(self._all_heads)
        with undisturbed(self.dtype):
            frame = config_from_atoms(atoms, keys, None, heads[self._head_index])
            graph = AtomicData.from_config(frame, table, self.r_max, heads)
        for key in graph.keys:
            if key not in self._keys:
                del graph[key]
        return graph

    def batch(self, graphs: Sequence[Any]) -> Any:
        """Collate graphs into one."""
        from mace.tools.torch_geometric import Batch

        return Batch.from_data_list(list(graphs)).to(self.device)

    def predict(
        self,
        batch: Any,
        weights: Mapping[str, Tensor],
        properties: Collection[Property],
        *,
        training: bool = False,
    ) -> dict[Property, Tensor]:
        """Predict energy, forces and stress; see the contract."""
        data = batch.to_dict()
        # The model asks for a gradient of the tensor itself; an alias keeps the batch.
        data["positions"] = data["positions"].detach()
        options = {
            "training": training,
            "compute_force": "forces" in properties,
            "compute_stress": "stress" in properties,
        }
        # Forces are a derivative also in evaluation. e3nn's TorchScript would be
        # optimised after the first call, which then differs from all others in the
        # last bit; it is no faster for that.
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            model = self.training_model if training else self.model
            out = torch.func.functional_call(model, dict(weights), (data,), options)
        predicted: dict[Property, Tensor] = {}
        if "energy" in properties:
            predicted["energy"] = out["energy"]
        if "forces" in properties:
            predicted["forces"] = out["forces"]
        if "stress" in properties:
            # The vendor's matrix has ASE's sign; Voigt order xx, yy, zz, yz, xz, xy.
            rows, columns = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)
            predicted["stress"] = out["stress"][:, rows, columns]
        if not training:
            predicted = {name: value.detach() for name, value in predicted.items()}
        return predicted

    def features(
        self, batch: Any, weights: Mapping[str, Tensor], *, training: bool = False
    ) -> Features:
        """Return energies and the scalars of every product; see the contract."""
        data = batch.to_dict()
        i, j = data["edge_index"]
        positions = data["positions"].detach()
        # Vectors are sums of positions and shifts; their slopes are those by a shift.
        leaf = data["shifts"].detach().requires_grad_()
        data |= {"positions": positions, "shifts": leaf}
        options = {"training": training, "compute_force": False}
        with torch.enable_grad(), torch.jit.optimized_execution(False):
            vectors = positions[j] - positions[i] + leaf
            model: Any = self.training_model if training else self.model
            out = torch.func.functional_call(model, dict(weights), (data,), options)
            irreps = [product.linear.irreps_out for product in self.model.products]
            layers = out["node_feats"].split([ir.dim for ir in irreps], dim=1)
            scalars = [invariant(x, ir) for x, ir in zip(layers, irreps, strict=True)]
        return Features(
            energy=out["energy"],
            scalars=torch.cat(scalars, dim=1),
            pairs=data["edge_index"],
            vectors=vectors,
            structure=data["batch"],
            volumes=torch.linalg.det(data["cell"].view(-1, 3, 3)).abs(),
            leaf=leaf,
        )

    def rewritten(self) -> Any:
        """Return the model with layers rewritten for training; see the contract."""
        from e3nn import o3
        from mace.modules.symmetric_contraction import Contraction

        def fused(module: Any) -> Any:
            if type(module) is Contraction:
                module.__class__ = _by_element()
                return module
            is_product = type(module) is o3.TensorProduct
            if not (is_product and layers.Convolution.replaces(module)):
                return layers.drop_in(module)
            return _Fused(module, self.dtype).to(self.device)

        with _vendor():
            model: Any = layers.rewritten(self.model, fused)
        for interaction in model.interactions:
            # The vendor's switch for kernels that gather and sum by themselves.
            if isinstance(interaction.conv_tp, _Fused):
                interaction.conv_fusion = True
        return model

    def path_weights(self) -> list[PathWeight]:
        """Classify every parameter, with the paths of e3nn's own instructions."""
        records = []
        for name, parameter in self._original.named_parameters():
            block, _, rest = name.partition(".")
            role: Role = "readout"
            layer = None
            if block in ("interactions", "products"):
                role, layer = "interaction", int(rest.partition(".")[0])
            elif block in ("node_embedding", "radial_embedding", "joint_embedding"):
                role = "embedding"
            kind, paths = self._kind(name, tuple(parameter.shape))
            by_element = any(p.element_axis is not None for p in paths)
            by_head = any(p.head_axis is not None for p in paths)
            records.append(
                PathWeight(
                    name=name,
                    shape=tuple(parameter.shape),
                    kind=kind,
                    role=role,
                    layer=layer,
                    paths=paths,
                    elements=self.elements if by_element else (),
                    heads=self._heads if by_head else (),
                    properties=PROPERTIES if self._is_coupled(name) else (),
                    basis_axis=0 if name.endswith(_FROM_BASIS) else None,
                )
            )
        return records

    def _kind(
        self, name: str, shape: tuple[int, ...]
    ) -> tuple[Kind, tuple[IrrepsPath, ...]]:
        from e3nn import o3

        owner, _, leaf = name.rpartition(".")
        module = self._original.get_submodule(owner)
        if ".symmetric_contractions." in name:
            return self._contraction(name, shape)
        if isinstance(module, o3.Linear):
            return self._linear(module, owner, leaf, shape)
        if isinstance(module, o3.TensorProduct):
            return "fctp", instruction_paths(module, element_axis=1)
        if _RADIAL_MODULES & set(owner.split(".")):
            return "radial", ()
        return "other", ()

    def _linear(
        self, module: Any, owner: str, leaf: str, shape: tuple[int, ...]
    ) -> tuple[Kind, tuple[IrrepsPath, ...]]:
        """Classify the weight or the bias of an ``o3.Linear``.

        In the readouts of a model with several heads the channels of each head are
        neighbours, and the vendor masks those of the other heads.
        """
        n_heads = len(self._heads)

        def by_head(channels: int) -> tuple[int, ...]:
            return (n_heads,) if channels == n_heads else (n_heads, channels // n_heads)

        reads_out = n_heads > 1 and owner.startswith(_READOUTS)
        if leaf == "bias":
            path = IrrepsPath(0, shape[0], shape, "0e", "0e")
            if reads_out:
                path = replace(path, shape=by_head(shape[0]), head_axis=0)
            return "other", (path,)
        axis = 0 if owner.endswith(_FROM_ELEMENTS) else None
        paths = instruction_paths(module, element_axis=axis)
        if not reads_out:
            return "linear", paths
        is_masked = owner.endswith((".linear_mid", ".linear_2"))
        split = []
        for path in paths:
            mul_in, mul_out = path.shape
            rows = by_head(mul_in) if is_masked else (mul_in,)
            axes = (0, len(rows)) if is_masked else (1,)
            split.append(replace(path, shape=rows + by_head(mul_out), head_axis=axes))
        return "linear", tuple(split)

    def _contraction(
        self, name: str, shape: tuple[int, ...]
    ) -> tuple[Kind, tuple[IrrepsPath, ...]]:
        """Classify a weight (n_elements, n_couplings, channels) of a product basis.

        `Path.irrep_in` is the sum of the irreps whose products are coupled.
        """
        basis, _, rest = name.partition(".contractions.")
        index = int(rest.partition(".")[0])
        contractions = self._original.get_submodule(basis)
        irreps_in = contractions.contractions[index].coupling_irreps
        product = self._original.get_submodule(basis.rpartition(".")[0])
        is_agnostic = getattr(product, "use_agnostic_product", False)
        path = IrrepsPath(
            start=0,
            stop=math.prod(shape),
            shape=shape,
            irrep_in="+".join(str(ir) for _, ir in irreps_in),
            irrep_out=str(contractions.irreps_out[index].ir),
            element_axis=None if is_agnostic else 0,
        )
        return "contraction", (path,)

    def _is_coupled(self, name: str) -> bool:
        """Whether anything depends on a parameter.

        The vendor keeps a weight also where a product basis has no coupling.
        """
        if ".symmetric_contractions." not in name:
            return True
        owner, _, leaf = name.partition(".weights")  # "_max", ".0", ".1", ...
        module = self._original.get_submodule(owner)
        order = module.correlation
        if leaf != "_max":  # weights.0 is of the next lower order, and so on
            order -= 1 + int(leaf[1:])
        return bool(getattr(module, f"U_matrix_{order}").any())

    def stored_weights(self) -> Mapping[str, Tensor]:
        """Every named parameter in the precision of the file."""
        return {n: p.detach() for n, p in self._original.named_parameters()}

    def reference_energies(self) -> dict[str, float]:
        """Return atomic energies (eV), the head's constant shift included."""
        energies = _row(self._original, self._head_index).double()
        if hasattr(self._original, "scale_shift"):
            shift = torch.atleast_1d(self._original.scale_shift.shift)
            energies = energies + shift[self._head_index].double()
        return dict(zip(self.elements, energies.tolist(), strict=True))

    def _merged(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Any:
        """Return a copy of the file's model with weights and atomic energies set."""
        with _vendor():
            model = copy.deepcopy(self._original)
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_parameter(name).copy_(weight)
            energies = _row(model, self._head_index)
            for symbol, shift in shifts.items():
                index = self.elements.index(symbol)
                energies[index] = energies[index].double() + shift
        return model

    def save(
        self, path: Path, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write a ``.model`` that the vendor's tools load unchanged."""
        buffer = io.BytesIO()
        with _vendor():
            torch.save(self._merged(weights, shifts), buffer)
        files.write_bytes(path, buffer.getvalue())

    def calculator(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Calculator:
        """Return a MACECalculator in this backend's precision."""
        return self._calculator(weights, shifts)

    def accelerated(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float], name: str
    ) -> Calculator:
        """Return a MACECalculator that has converted the merged model."""
        return self._calculator(weights, shifts, **{f"enable_{name}": True})

    def _calculator(
        self,
        weights: Mapping[str, Tensor],
        shifts: Mapping[str, float],
        **kernels: bool,
    ) -> Calculator:
        model = self._in_use(self._merged(weights, shifts))
        with _vendor():
            from mace.calculators import MACECalculator

            return MACECalculator(
                models=model,
                device=str(self.device),
                default_dtype=str(self.dtype).removeprefix("torch."),
                head=self._all_heads[self._head_index],
                **kernels,
            )


class _Fused(layers.Convolution):
    """The convolution as an interaction block calls a fused kernel."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """(n_atoms, irreps_in) -> (n_atoms, irreps_mid)."""
        x, y, weight, edge_index = inputs
        return super().forward(x, y, weight, *edge_index)


@functools.cache
def _by_element() -> Any:
    """Return the vendor's product basis, contracted in another order.

    The vendor applies the coupling tensor to every atom and channel, the weights after
    it. Weights belong to elements, of which a batch has few: couple them first, and
    what is left to do for every atom is a fraction of it.
    """
    from mace.modules.symmetric_contraction import Contraction

    class ByElement(Contraction):
        """out = ((T3 x + T2) x + T1) x, with T of the element and the channel."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            """(n, channels, dim) and one-hot (n, n_elements) -> (n, channels * out)."""
            present, index = y.argmax(dim=1).unique(return_inverse=True)
            n, channels, dim = x.shape
            if len(present) * dim > 2 * n:  # the tables would take too much memory
                plain: Tensor = super().forward(x, y)
                return plain
            tables = [
                # (n_present, out * dim^degree, channels)
                self.U_tensors(self.correlation - i).flatten(0, -2)
                @ weight.index_select(0, present)
                for i, weight in enumerate((self.weights_max, *self.weights))
            ]
            order = index.argsort()
            parts = x.index_select(0, order).split(torch.bincount(index).tolist())
            outs = []
            for part, first, *others in zip(parts, *tables, strict=True):
                atoms = part.transpose(0, 1)
                out = atoms @ first.T.reshape(channels, -1, dim).transpose(1, 2)
                for table in others:
                    out = (out + table.T.unsqueeze(1)).unflatten(2, (-1, dim))
                    out = (out @ atoms.unsqueeze(-1)).squeeze(-1)
                outs.append(out.transpose(0, 1))
            return torch.cat(outs).index_select(0, order.argsort()).flatten(1)

    return ByElement


def _row(model: Any, head: int) -> Tensor:
    """Return the view of the atomic energies (eV) that a head uses."""
    energies: Tensor = model.atomic_energies_fn.atomic_energies
    return torch.atleast_2d(energies)[head]


def _compute_couplings(model: Any) -> None:
    """Compute coupling constants again in float64; a cast breaks symmetry at 1e-8 eV.

    These are e3nn's Wigner 3j symbols and the generalised Clebsch-Gordan coefficients
    of the product basis. The latter are the stored ones, projected on the span of the
    exact ones: the vendor has had more than one basis of the same couplings.
    """
    from e3nn import o3
    from mace.modules.symmetric_contraction import SymmetricContraction
    from mace.tools.cg import U_matrix_real

    for name, buffer in model.named_buffers():
        if found := re.search(r"\._w3j_(\d+)_(\d+)_(\d+)$", name):
            degrees = map(int, found.groups())
            buffer.copy_(o3.wigner_3j(*degrees, dtype=torch.float64))
    bases: list[Any] = [
        m for m in model.modules() if isinstance(m, SymmetricContraction)
    ]
    for basis in bases:
        for (_, irrep), module in zip(
            basis.irreps_out, basis.contractions, strict=True
        ):
            for order in range(1, module.correlation + 1):
                stored = getattr(module, f"U_matrix_{order}")
                exact = U_matrix_real(
                    irreps_in=module.coupling_irreps,
                    irreps_out=o3.Irreps([irrep]),
                    correlation=order,
                    use_cueq_cg=False,
                    dtype=torch.float64,
                )[-1].flatten(0, -2)
                wanted = stored.flatten(0, -2)
                mixed = exact @ torch.linalg.lstsq(exact, wanted).solution
                assert torch.allclose(mixed, wanted, atol=1e-5), "another basis"
                stored.copy_(mixed.view_as(stored))


def _symbols(atomic_numbers: Tensor) -> tuple[str, ...]:
    from ase.data import chemical_symbols

    return tuple(chemical_symbols[z] for z in atomic_numbers.tolist())
