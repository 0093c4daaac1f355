"""NequIP (mir-group): packages, checkpoints and the models of nequip.net."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pathtune import files, layers, trust
from pathtune.backends.base import Backend as Contract
from pathtune.backends.base import (
    Features,
    ModelInfo,
    instruction_paths,
    invariant,
    pick_head,
    reading,
    run_in_turn,
    undisturbed,
)
from pathtune.errors import PathtuneError, UsageError
from pathtune.paths import Kind, PathWeight, Role
from pathtune.paths import Path as IrrepsPath
from pathtune.properties import PROPERTIES, Property

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

PACKAGE = ".nequip.zip"
# What has the radial basis functions along its first axis.
_FROM_BASIS = ("bessel_weights", ".edge_mlp.mlp.0.weight")
_SITE = "nequip.net:"
# Released name -> identifier on nequip.net. No hash of them is known here.
_RELEASED: Mapping[str, str] = {
    f"NequIP-{name}": f"mir-group/NequIP-{name}:0.1"
    for name in ("OAM-S", "OAM-M", "OAM-L", "OAM-XL", "MP-L")
}


def _identifier(model: str) -> str | None:
    """Return the nequip.net identifier behind a name, if it is one."""
    if model.lower().startswith(_SITE):
        return model[len(_SITE) :]
    by_name = {name.lower(): identifier for name, identifier in _RELEASED.items()}
    return by_name.get(model.lower())


def _cache() -> Path:
    """Return the folder in which the vendor keeps what it has downloaded."""
    folder = os.environ.get("NEQUIP_CACHE_DIR")
    return Path(folder).expanduser() if folder else Path.home() / ".nequip/model_cache"


def _cached(identifier: str) -> Path | None:
    """Return a model's file in the vendor's cache.

    The vendor asks nequip.net even for what it has already downloaded; a compute node
    without a network cannot.
    """
    for record in sorted(_cache().glob("*.metadata.json")):
        path = record.with_name(record.name.replace(".metadata.json", PACKAGE))
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the vendor, too, takes the model for not downloaded
        if content.get("model_id") == identifier and path.is_file():
            return path
    return None


def _download(identifier: str) -> Path:
    """Let the vendor fetch a model into its cache."""
    from nequip.model.saved_models.load_utils import _get_model_file_path
    from nequip.utils.model_repository import ModelNotFoundError, NequIPNetAPIClient

    if not NequIPNetAPIClient.MODEL_ID_PATTERN.match(identifier):
        raise UsageError(
            f"{identifier!r} is no identifier of nequip.net, such as "
            f"{_RELEASED['NequIP-OAM-L']!r}"
        )
    try:
        with _get_model_file_path(_SITE + identifier) as path:
            return Path(path)
    except ModelNotFoundError as error:
        raise UsageError(
            f"nequip.net has no {identifier!r}; known here: {', '.join(_RELEASED)}"
        ) from error
    except (OSError, ValueError, AssertionError) as error:
        reason = str(error).partition("(Caused by")[0][:200]
        raise PathtuneError(
            f"{identifier} has to be downloaded and that failed ({reason}). Where "
            f"there is a network, get https://www.nequip.net/models/{identifier} and "
            f"give the package's path (*{PACKAGE}), or load it there once and copy the "
            f"folder {_cache()}"
        ) from error


def _resolve(model: str, *, trust_checkpoint: bool) -> Path:
    """Return the file behind a name or path, if it may be opened."""
    identifier = _identifier(model)
    if identifier is None:
        path = Path(model)
    else:
        with _vendor_state():
            path = _cached(identifier) or _download(identifier)
    trust.require(path, (), trust=trust_checkpoint)
    return path


@contextlib.contextmanager
def _vendor_state() -> Iterator[None]:
    """Run the vendor's code as after its `set_global_state`, without that call.

    Of all it sets, an eager model needs the default dtype and the flag that it was
    called. Seeds, TF32, fusion and compiler settings stay the process's, and a user's
    own call afterwards is not skipped.
    """
    with undisturbed(torch.float64):
        warnings.simplefilter("ignore")
        import e3nn
        from nequip.utils import global_state

        initialized = global_state._GLOBAL_STATE_INITIALIZED
        # Building a model leaves e3nn's default at TorchScript.
        optimization = e3nn.get_optimization_defaults()
        global_state._GLOBAL_STATE_INITIALIZED = True
        try:
            yield
        finally:
            global_state._GLOBAL_STATE_INITIALIZED = initialized
            e3nn.set_optimization_defaults(**optimization)


def _read(path: Path) -> Any:
    """Return the eager model of a package or checkpoint, as the vendor loads it."""
    with _vendor_state():
        from nequip.model.saved_models import load_saved_model

        with reading(path, "a NequIP package or checkpoint"):
            models = load_saved_model(path, model_key=None)
    return _sole(models, path)


def _sole(models: Any, path: Path) -> Any:
    if list(models) != ["sole_model"]:
        raise PathtuneError(
            f"{path} holds several models ({', '.join(models)}); only files of one "
            "model can be tuned"
        )
    return models["sole_model"]


def _to_double(model: Any) -> None:
    """Compute in float64 what the vendor computes in float32.

    Coupling constants are rebuilt; scalar normalisations keep the rounding with which
    the vendor applies them, so that this is the same function.
    """
    from e3nn import o3

    for module in model.modules():
        for name, value in vars(module).items():
            if value is torch.float32:  # what a layer casts its input or output to
                setattr(module, name, torch.float64)
        for name, buffer in module._buffers.items():
            if match := re.fullmatch(r"_w3j_(\d+)_(\d+)_(\d+)", name):
                exact = o3.wigner_3j(*map(int, match.groups()), dtype=torch.float64)
                assert torch.allclose(exact.to(buffer), buffer), "e3nn's basis changed"
                setattr(module, name, exact)
    model.double()


class Backend(Contract):
    """A NequIP package or checkpoint.

    In float32 the vendor's own mixed precision is used: float32 layers between float64
    positions and energies. In float64 the layers and their coupling constants are too.

    A merged file is of its base's kind. A package is written in the steps of the
    vendor's ``nequip-package modify``, with all code, compile modes and example data of
    the base; a checkpoint holds the weights without the state of its optimizer, and
    ``nequip-package build`` makes a package of it.
    """

    name: ClassVar[str] = "nequip"
    vendor: ClassVar[str] = "nequip"
    suffixes: ClassVar[tuple[str, ...]] = (PACKAGE, ".ckpt")
    properties: frozenset[Property] = frozenset({"energy", "forces", "stress"})

    _path: Path
    _sha256: str
    _stored: dict[str, Tensor]
    _transforms: Sequence[Any]
    model: Any

    @classmethod
    def models(cls) -> list[ModelInfo]:
        """List the released models; they are fetched from nequip.net."""
        infos = []
        for name, identifier in _RELEASED.items():
            cached = _cached(identifier)
            reason = "downloaded by the vendor when used"
            if cached is not None:
                reason = "in the vendor's cache"
            if not cls.is_installed():
                reason = "not installed: pip install 'pathtune[nequip]'"
            what = f"{_SITE}{identifier}; needs --trust-checkpoint once"
            there = cls.is_installed() and cached is not None
            infos.append(ModelInfo(cls.name, name, there, reason, what))
        return infos

    @classmethod
    def knows(cls, model: str) -> bool:
        """Whether `model` is a released NequIP or a ``nequip.net:`` identifier."""
        return _identifier(model) is not None

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
        """Load a released NequIP by name, a ``.nequip.zip`` package or a checkpoint.

        Parameters
        ----------
        model
            ``NequIP-OAM-L``, ..., ``nequip.net:group/name:version`` or a file.
        dtype
            torch.float32 (as the vendor) or torch.float64, of the layers.
        device
            PyTorch device.
        head
            NequIP has no heads; None.
        trust_checkpoint
            Open a pickled file of unknown hash, and remember it.

        Raises
        ------
        PathtuneError
            If the file is missing, unreadable, no NequIP model, or not trusted.
        UsageError
            If the identifier is unknown, a head is given, or the model is a float64
            one and `dtype` would round it.
        """
        path = _resolve(model, trust_checkpoint=trust_checkpoint)
        self = cls()
        self.model_name = model if cls.knows(model) else path.name
        self.head = pick_head(head, (), self.model_name)
        self.model = _read(path)
        stored = self.model.model_dtype
        if stored == torch.float64 and dtype != stored:
            raise UsageError(
                f"{self.model_name} is a float64 model: add --dtype float64"
            )
        self._path, self._sha256 = path.absolute(), files.sha256(path)
        self._stored = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.dtype = dtype
        self.device = torch.device(device)
        self._describe()
        if dtype != stored:
            _to_double(self.model)
        self.model.to(self.device).eval().requires_grad_(False)
        return self

    def _describe(self) -> None:
        """Read elements, cutoff and symmetry off the vendor's model."""
        from ase.data import atomic_numbers

        self.elements = tuple(self.model.type_names)
        if strange := [e for e in self.elements if e not in atomic_numbers]:
            raise PathtuneError(
                f"{self.model_name} has atom types that are no chemical symbols: "
                f"{', '.join(strange)}"
            )
        embedded = "categorical_graph_field_embed_modules"
        if more := {k for m in self.model.modules() for k in getattr(m, embedded, ())}:
            raise PathtuneError(
                f"{self.model_name} needs more than a structure as its input: "
                f"{', '.join(sorted(more))}"
            )
        metadata = self.model.metadata
        self.r_max = float(metadata["r_max"])
        edges = self.model.irreps_out["edge_attrs"]
        self.has_inversion = all(ir.p == (-1) ** ir.l for _, ir in edges)
        by_element = len(_scale_shift(self.model).shifts) == len(self.elements)
        self.has_shift_by_element = by_element or self._is_package
        with _vendor_state():
            from nequip.integrations.utils import basic_transforms

            self._transforms = basic_transforms(
                metadata,
                self.r_max,
                list(self.elements),
                {symbol: symbol for symbol in self.elements},
            )

    @property
    def _is_package(self) -> bool:
        return self._path.name.endswith(PACKAGE)

    def _require_unchanged(self) -> None:
        """Refuse to read the base again if it is another file by now."""
        if not self._path.is_file() or files.sha256(self._path) != self._sha256:
            raise PathtuneError(
                f"{self._path} is gone or has changed since it was loaded; merging "
                "needs it once more"
            )

    def graph(self, atoms: Atoms) -> Any:
        """Build the vendor's graph (its own neighbour list) of one structure."""
        from ase import Atoms
        from nequip.data.ase import from_ase
        from nequip.utils.dtype import torch_default_dtype

        bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        with torch_default_dtype(torch.float64):
            data = from_ase(bare)
            for transform in self._transforms:
                data = transform(data)
        return {key: data[key] for key in self.model.model_input_fields if key in data}

    def batch(self, graphs: Sequence[Any]) -> Any:
        """Collate graphs into one."""
        from nequip.data import AtomicDataDict

        batch = AtomicDataDict.batched_from_list(list(graphs))
        return AtomicDataDict.to_(batch, self.device)

    def predict(
        self,
        batch: Any,
        weights: Mapping[str, Tensor],
        properties: Collection[Property],
        *,
        training: bool = False,
    ) -> dict[Property, Tensor]:
        """Predict energy, forces and stress; see the contract.

        Forces and stress come out of one derivative; neither costs more than the other.
        A structure without a volume has a stress of NaN.
        """
        model = self.training_model if training else self.model
        model.train(training)
        with torch.enable_grad():  # forces are a derivative also in evaluation
            out = torch.func.functional_call(model, dict(weights), (batch,))
        predicted: dict[Property, Tensor] = {}
        if "energy" in properties:
            predicted["energy"] = out["total_energy"].squeeze(-1)
        if "forces" in properties:
            predicted["forces"] = out["forces"]
        if "stress" in properties:
            stress = out["stress"].flatten(1)
            predicted["stress"] = stress[:, [0, 4, 8, 5, 2, 1]]
        if not training:
            predicted = {name: value.detach() for name, value in predicted.items()}
        return predicted

    def features(
        self, batch: Any, weights: Mapping[str, Tensor], *, training: bool = False
    ) -> Features:
        """Return energies and the scalars of every layer; see the contract.

        In this model's precision, except for energies, which are in float64.
        """
        from nequip.nn.utils import with_edge_vectors_

        model: Any = self.training_model if training else self.model
        model.train(training)
        data = with_edge_vectors_({**batch}, with_lengths=False)
        leaf = data["edge_vectors"].detach().requires_grad_()
        data["edge_vectors"] = leaf
        # The energy's model, inside the one that differentiates it.
        prefix = "model.func."
        energy_model = model.get_submodule(prefix[:-1])
        inner = {n.removeprefix(prefix): w for n, w in weights.items()}
        scalars = []
        with torch.enable_grad():
            for name, block, out in run_in_turn(energy_model, inner, data):
                if re.fullmatch(r"layer\d+_convnet", name):
                    features, irreps = out["node_features"], block.irreps_out
                    scalars.append(invariant(features, irreps["node_features"]))
            vectors = leaf.to(self.dtype)
        structure = data.get("batch", torch.zeros(len(data["pos"]), dtype=torch.long))
        energy = out["total_energy"].squeeze(-1)
        cell = data.get("cell", torch.zeros(len(energy), 3, 3))
        return Features(
            energy=energy,
            scalars=torch.cat(scalars, dim=1).to(self.dtype),
            pairs=data["edge_index"],
            vectors=vectors,
            structure=structure.to(self.device),
            volumes=torch.linalg.det(cell.view(-1, 3, 3)).abs().to(leaf),
            leaf=leaf,
        )

    def rewritten(self) -> nn.Module:
        """Return the model with layers rewritten for training; see the contract."""

        def replacement(module: Any) -> nn.Module | None:
            # Classes of packages are copies of the vendor's: go by their names.
            kind = type(module).__name__
            if kind == "TensorProductScatter" and layers.Convolution.replaces(
                module.tp
            ):
                fused = _Fused(layers.Convolution(module.tp, self.dtype))
                return fused.to(self.device)
            if kind == "Linear" and hasattr(module, "irreps_in"):
                return layers.Linear(module) if layers.Linear.replaces(module) else None
            return None

        return layers.rewritten(self.model, replacement)

    def path_weights(self) -> list[PathWeight]:
        """Classify every parameter, with the paths of e3nn's own instructions."""
        modules = dict(self.model.named_modules())
        records = []
        for name, parameter in self.model.named_parameters():
            layer = re.search(r"\blayer(\d+)_", name)
            role: Role = "embedding"
            if layer:
                role = "interaction"
            elif "readout" in name or "scale_shift" in name or "pair_pot" in name:
                role = "readout"
            shape = tuple(parameter.shape)
            kind, paths = self._kind(name, shape, modules[name.rpartition(".")[0]])
            by_element = any(p.element_axis is not None for p in paths)
            records.append(
                PathWeight(
                    name=name,
                    shape=shape,
                    kind=kind,
                    role=role,
                    layer=int(layer[1]) if layer else None,
                    paths=paths,
                    elements=self.elements if by_element else (),
                    properties=("energy",) if name.endswith(".shifts") else PROPERTIES,
                    unused=() if by_element else self._unused[name],
                    basis_axis=0 if name.endswith(_FROM_BASIS) else None,
                )
            )
        return records

    def _kind(
        self, name: str, shape: tuple[int, ...], module: Any
    ) -> tuple[Kind, tuple[IrrepsPath, ...]]:
        """Classify by what a layer has: classes of packages are copies of the vendor's.

        The self-connection multiplies the features with the type embedding, not with a
        one-hot vector: its middle axis runs over the embedding, not over the elements.
        """
        if hasattr(module, "instructions") and name.endswith(".weight"):
            kind: Kind = "linear" if hasattr(module, "irreps_in") else "fctp"
            return kind, instruction_paths(module)
        if ".edge_mlp." in name or ".bessel" in name:
            return "radial", ()
        if "scale_shift" in name:
            return "scale_shift", _scalar_path(shape, element_axis=0)
        if ".embed_module." in name:
            return "linear", _scalar_path(shape, element_axis=0)
        if "readout" in name and len(shape) == 2:
            return "linear", _scalar_path(shape)
        return "other", ()

    @functools.cached_property
    def _unused(self) -> dict[str, tuple[int, ...]]:
        """Return the entries of each parameter that nothing depends on.

        The last layer has scalars only, so it cannot read what pseudovectors the one
        before it may have. Random weights find these: at the base's a gradient may also
        vanish because another weight is zero.
        """
        from ase import Atoms

        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        n = min(6, len(self.elements))
        positions = self.r_max / 4 * normal(n + 2, 3)
        cluster = Atoms(self.elements[:n] + self.elements[:1] * 2, positions.numpy())
        weights = {
            name: normal(*p.shape).to(p).requires_grad_()
            for name, p in self.model.named_parameters()
        }
        batch = self.batch([self.graph(cluster)])
        out = self.predict(batch, weights, ["energy", "forces"], training=True)
        loss = out["energy"].sum() + (out["forces"] ** 2).sum()
        gradients = torch.autograd.grad(
            loss, list(weights.values()), materialize_grads=True
        )
        return {
            name: tuple(torch.nonzero(gradient.flatten() == 0).flatten().tolist())
            for name, gradient in zip(weights, gradients, strict=True)
        }

    def stored_weights(self) -> Mapping[str, Tensor]:
        """Every named parameter as the file has it."""
        return self._stored

    def reference_energies(self) -> dict[str, float]:
        """Return the per-type energy shift of each element (eV)."""
        shifts = _scale_shift(self.model).shifts.detach().cpu().flatten()
        values = shifts if len(shifts) else torch.zeros(1)
        return dict(
            zip(self.elements, values.expand(len(self.elements)).tolist(), strict=True)
        )

    def _merge_into(
        self, model: Any, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write merged weights and shifted reference energies into a vendor's model."""
        merged = {**self._stored, **weights}
        module = _scale_shift(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(merged[name])
            if not any(shifts.values()):
                return
            if not self.has_shift_by_element:
                raise PathtuneError(
                    f"{self.model_name} has one reference energy for all elements and "
                    "cannot hold shifts by element; make a package of it first "
                    "(nequip-package build)"
                )
            added = torch.tensor(
                [[shifts.get(symbol, 0.0)] for symbol in self.elements],
                dtype=torch.float64,
            )
            if len(module.shifts) == len(self.elements):
                module.shifts += added.view_as(module.shifts)
            else:  # one for all elements, or none
                module.shifts = module.shifts.sum() + added
                module.has_shifts, module.shifts_shortcut = True, False

    def save(
        self, path: Path, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write a package if the base is one, else a checkpoint.

        Raises
        ------
        UsageError
            If the file's name asks for the other.
        """
        if path.name.endswith(PACKAGE) != self._is_package:
            theirs = PACKAGE if self._is_package else ".ckpt"
            more = "" if self._is_package else "; nequip-package build packages it"
            raise UsageError(
                f"{self.model_name} is merged into a file of its own kind: name it "
                f"*{theirs}, not {path.name}{more}"
            )
        self._require_unchanged()
        buffer = io.BytesIO()
        with _vendor_state():
            write = self._write_package if self._is_package else self._write_checkpoint
            write(buffer, weights, shifts)
        files.write_bytes(path, buffer.getvalue())

    def _write_package(
        self, file: Any, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Re-export the package; see ``modify`` in the vendor's nequip-package."""
        from nequip.model.saved_models import package as vendor
        from nequip.scripts import _package_utils as modules
        from torch.package import PackageExporter, PackageImporter, sys_importer

        base = PackageImporter(str(self._path))

        def load(resource: str) -> Any:
            with vendor._cpu_deserialize_always():
                return base.load_pickle("model", resource, map_location="cpu")

        with PackageExporter(file, importer=(base, sys_importer)) as merged:
            merged.mock([f"{name}.**" for name in modules._MOCK_MODULES])
            merged.extern([f"{name}.**" for name in modules._EXTERNAL_MODULES])
            merged.intern([f"{name}.**" for name in modules._INTERNAL_MODULES])
            for text in ("config.yaml", "package_metadata.txt"):
                merged.save_text("model", text, base.load_text("model", text))
            example = "example_data.pkl"
            merged.save_pickle("model", example, load(example))
            for mode in vendor._get_package_metadata(base)["available_models"]:
                models = load(f"{mode}_model.pkl")
                self._merge_into(_sole(models, self._path), weights, shifts)
                merged.save_pickle("model", f"{mode}_model.pkl", models)

    def _write_checkpoint(
        self, file: Any, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write what Lightning calls a checkpoint of weights only."""
        from hydra.utils import get_class
        from nequip.model import override_model_compile_mode

        checkpoint = torch.load(self._path, map_location="cpu", weights_only=False)
        info = checkpoint["hyper_parameters"]["info_dict"]
        with override_model_compile_mode("eager"):
            training: Any = get_class(info["training_module"]["_target_"])
            module = training.load_from_checkpoint(
                self._path, map_location="cpu", weights_only=False
            )
        self._merge_into(_sole(module.model, self._path), weights, shifts)
        if hasattr(module, "ema"):
            module.ema.num_updates = 0  # the average starts from the merged weights
            module.ema.update_parameters(module.model)
        for state in (
            "callbacks",
            "optimizer_states",
            "lr_schedulers",
            "schedulefree_optimizer_state_dict",
        ):
            checkpoint.pop(state, None)
        torch.save(checkpoint | {"state_dict": module.state_dict()}, file)

    def calculator(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Calculator:
        """Return a NequIPCalculator of the merged model, not compiled."""
        self._require_unchanged()
        model = _read(self._path)
        self._merge_into(model, weights, shifts)
        if self.dtype != model.model_dtype:
            _to_double(model)
        with _vendor_state():
            from nequip.integrations.ase import NequIPCalculator
            from nequip.utils.dtype import torch_default_dtype

            class Calculator(NequIPCalculator):
                """The vendor's, which counts on its global default dtype."""

                def calculate(self, *args: Any, **kwargs: Any) -> None:
                    with torch_default_dtype(torch.float64):
                        super().calculate(*args, **kwargs)

            return Calculator(
                model.eval(), device=self.device, transforms=list(self._transforms)
            )


def _scale_shift(model: Any) -> Any:
    """Return the module that holds the energy scale and shift of each type."""
    found = (m for m in model.modules() if hasattr(m, "shifts_shortcut"))
    return next(m for m in found if m.out_field == "atomic_energy")


def _scalar_path(
    shape: tuple[int, ...], element_axis: int | None = None
) -> tuple[IrrepsPath, ...]:
    """Return the one path of a weight between scalars."""
    size = math.prod(shape)
    return (IrrepsPath(0, size, shape, "0e", "0e", element_axis=element_axis),)


class _Fused(nn.Module):
    """The convolution as the vendor's interaction block calls it."""

    def __init__(self, convolution: layers.Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(
        self,
        x: Tensor,
        edge_attr: Tensor,
        edge_weight: Tensor,
        edge_dst: Tensor,
        edge_src: Tensor,
    ) -> Tensor:
        """(n_atoms, irreps_in) -> (n_atoms, irreps_mid)."""
        summed: Tensor = self.convolution(x, edge_attr, edge_weight, edge_src, edge_dst)
        return summed
