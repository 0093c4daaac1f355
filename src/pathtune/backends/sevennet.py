"""SevenNet (MDIL-SNU): checkpoints, graphs, path weights and reference energies."""

from __future__ import annotations

import importlib.util
import io
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
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
    run_in_turn,
    undisturbed,
)
from pathtune.errors import PathtuneError, UsageError
from pathtune.paths import Kind, PathWeight, Role
from pathtune.paths import Path as IrrepsPath
from pathtune.properties import Property

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator


# Name -> (file below the vendor's pretrained folder, SHA-256, heads). The plain name
# "7net-0" means the later of the two SevenNet-0 checkpoints, as the vendor has it.
_BUNDLED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "7net-0": (
        "SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
        (),
    ),
    "7net-0_22may2024": (
        "SevenNet_0__22May2024/checkpoint_sevennet_0.pth",
        "5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
        (),
    ),
    "7net-l3i5": (
        "SevenNet_l3i5/checkpoint_l3i5.pth",
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
        (),
    ),
    "7net-mf-0": (
        "SevenNet_MF_0/checkpoint_sevennet_mf_0.pth",
        "81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        ("R2SCAN", "PBE"),
    ),
}
_ALIASES = {"7net-0_11july2024": "7net-0", "7net-0_11jul2024": "7net-0"}
# The vendor fetches these itself; no hash of them is known here.
_DOWNLOADED = (
    "7net-mf-ompa",
    "7net-omat",
    "7net-omni",
    "7net-omni-i8",
    "7net-omni-i12",
)
_RELEASED = frozenset(digest for _, digest, _ in _BUNDLED.values())
# What has the radial basis functions along its first axis.
_FROM_BASIS = ("basis_function.coeffs", ".weight_nn.layer0.weight")


def _vendor_folder() -> Path | None:
    spec = importlib.util.find_spec("sevenn")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pretrained_potentials"


def _canonical(name: str) -> str:
    name = name.lower().replace("sevennet-", "7net-")
    return _ALIASES.get(name, name)


def _resolve(model: str, *, trust_checkpoint: bool) -> Path:
    """Return the checkpoint file behind a name or path, if it may be opened."""
    name = _canonical(model)
    if name in _BUNDLED:
        folder = _vendor_folder()
        assert folder is not None, "the vendor is installed"
        path = folder / _BUNDLED[name][0]
    elif name in _DOWNLOADED:
        from sevenn.util import pretrained_name_to_path

        try:
            path = Path(pretrained_name_to_path(name))
        except OSError as error:
            raise PathtuneError(
                f"{name} has to be downloaded and that failed ({error}); download it "
                "where there is a network and give its path"
            ) from error
    else:
        path = Path(model)
    trust.require(path, _RELEASED, trust=trust_checkpoint)
    return path


class Backend(Contract):
    """A SevenNet checkpoint.

    In float64 the model is rebuilt in double precision: coupling constants, graphs
    and the one-hot encoding included, which the vendor keeps in float32.
    """

    name: ClassVar[str] = "sevennet"
    vendor: ClassVar[str] = "sevenn"
    suffixes: ClassVar[tuple[str, ...]] = (".pth", ".pt")
    accelerators: ClassVar[Mapping[str, str]] = {
        "cueq": "cuequivariance_torch",
        "flash": "flashTP_e3nn",
        "oeq": "openequivariance",
    }
    properties: frozenset[Property] = frozenset({"energy", "forces", "stress"})

    _checkpoint: Any
    _config: dict[str, Any]
    _stored: dict[str, Tensor]
    _heads: tuple[str, ...]
    model: Any

    @classmethod
    def models(cls) -> list[ModelInfo]:
        """List the released models; which file of the vendor's each name means."""
        folder = _vendor_folder()
        missing = "not installed: pip install 'pathtune[sevennet]'"
        infos = []
        for name, (file, digest, heads) in _BUNDLED.items():
            there = folder is not None and (folder / file).is_file()
            absent = missing if folder is None else "not in the installed sevenn"
            reason = "in the vendor's package" if there else absent
            what = f"{file} (sha256 {digest[:12]})"
            # They are part of the package, and under its licence.
            infos.append(ModelInfo(cls.name, name, there, reason, what, heads, "MIT"))
        for name in _DOWNLOADED:
            reason = missing if folder is None else "downloaded by the vendor when used"
            what = "fetched by sevenn; needs --trust-checkpoint once"
            infos.append(ModelInfo(cls.name, name, False, reason, what))
        return infos

    @classmethod
    def knows(cls, model: str) -> bool:
        """Whether `model` is a released SevenNet name."""
        return _canonical(model) in {*_BUNDLED, *_DOWNLOADED}

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
        """Load a released SevenNet by name, or a ``.pth`` checkpoint.

        Parameters
        ----------
        model
            ``7net-0``, ``7net-l3i5``, ``7net-mf-0``, ... or a file.
        dtype
            torch.float32 (the vendor's precision) or torch.float64.
        device
            PyTorch device.
        head
            The modality of a multi-fidelity model, e.g. ``PBE``.
        trust_checkpoint
            Open a pickled file of unknown hash, and remember it.

        Raises
        ------
        PathtuneError
            If the file is missing, unreadable, no SevenNet checkpoint, or not trusted.
        UsageError
            If the name or the head is unknown.
        """
        path = _resolve(model, trust_checkpoint=trust_checkpoint)
        with undisturbed(torch.float32):
            warnings.simplefilter("ignore")
            from sevenn.checkpoint import SevenNetCheckpoint

            checkpoint = SevenNetCheckpoint(str(path))
            with reading(path, "a SevenNet checkpoint"):
                config = checkpoint.config
                single = checkpoint.build_model()
        self = cls()
        self.model_name = _canonical(model) if cls.knows(model) else path.name
        heads = single.modal_map or {}
        self._heads = tuple(sorted(heads, key=lambda name: heads[name]))
        self.head = pick_head(head, self._heads, self.model_name)
        self.dtype = dtype
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        self._config = config
        self._stored = {n: p.detach().clone() for n, p in single.named_parameters()}
        self.model = single if dtype == torch.float32 else self._in_double(single)
        self.model.requires_grad_(False)
        self.model.set_is_batch_data(True)
        self.model.to(self.device)
        self.elements = _symbols(single.type_map or {})
        self.r_max = float(single.cutoff)
        self.has_inversion = bool(config["is_parity"])
        shift = self._shift_row(self._stored["rescale_atomic_energy.shift"])
        self.has_shift_by_element = shift.numel() == len(self.elements)
        return self

    def _in_double(self, single: Any) -> Any:
        """Build the model again in float64 with the stored weights.

        Constants are computed again rather than cast: the checkpoint keeps its
        coupling coefficients in float32, which breaks symmetry at 1e-8 eV.
        """
        from sevenn.model_build import build_E3_equivariant_model
        from sevenn.nn.node_embedding import OnehotEmbedding

        class DoubleOnehotEmbedding(OnehotEmbedding):
            """The vendor's, without its cast to float32."""

            def forward(self, data: Any) -> Any:
                index = data[self.key_x]
                data = super().forward(data)
                one_hot = torch.nn.functional.one_hot(index, self.num_classes)
                data[self.key_output] = one_hot.double()
                if self.key_additional_output is not None:
                    data[self.key_additional_output] = data[self.key_output]
                return data

        with undisturbed(torch.float64):
            warnings.simplefilter("ignore")
            double = build_E3_equivariant_model(self._config).double()
        with torch.no_grad():
            for name, parameter in double.named_parameters():
                parameter.copy_(self._stored[name])
        for module in double.modules():
            if type(module) is OnehotEmbedding:
                module.__class__ = DoubleOnehotEmbedding
        return double

    def graph(self, atoms: Atoms) -> Any:
        """Build the vendor's graph (its own neighbour list) of one structure."""
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph

        arrays = unlabeled_atoms_to_graph(atoms, self.r_max)
        tensors = {}
        for key, value in arrays.items():
            if isinstance(value, np.ndarray):
                tensor = torch.from_numpy(np.ascontiguousarray(value))
                kind = self.dtype if tensor.is_floating_point() else torch.int64
                tensors[key] = tensor.to(kind)
        graph = AtomGraphData(**tensors)
        if self.head is not None:
            graph["data_modality"] = self.head
        return graph

    def batch(self, graphs: Sequence[Any]) -> Any:
        """Collate graphs into one."""
        from torch_geometric.data import Batch

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
        data = batch.clone()
        model = self.training_model if training else self.model
        model.train(training)
        with torch.enable_grad():  # forces are a derivative also in evaluation
            out = torch.func.functional_call(model, dict(weights), (data,))
        predicted: dict[Property, Tensor] = {}
        if "energy" in properties:
            predicted["energy"] = out["inferred_total_energy"]
        if "forces" in properties:
            predicted["forces"] = out["inferred_force"]
        if "stress" in properties:
            # SevenNet has the opposite sign and the order xx, yy, zz, xy, yz, zx.
            predicted["stress"] = -out["inferred_stress"][:, [0, 1, 2, 4, 5, 3]]
        if not training:
            predicted = {name: value.detach() for name, value in predicted.items()}
        return predicted

    def features(
        self, batch: Any, weights: Mapping[str, Tensor], *, training: bool = False
    ) -> Features:
        """Return energies and the scalars of every layer; see the contract."""
        data = batch.clone()
        model: Any = self.training_model if training else self.model
        model.train(training)
        scalars = []
        with torch.enable_grad():
            data = model._preprocess(data)
            vectors = data["edge_vec"]
            for name, block, out in run_in_turn(model, weights, data):
                if name.endswith("equivariant_gate"):
                    scalars.append(invariant(out["x"], block.gate.irreps_out))
                if name == "reduce_total_enegy":
                    break
        return Features(
            energy=out["inferred_total_energy"],
            scalars=torch.cat(scalars, dim=1),
            pairs=out["edge_index"],
            vectors=vectors,
            structure=out["batch"],
            volumes=out["cell_volume"],
            leaf=vectors,
        )

    def rewritten(self) -> Any:
        """Return the model with layers rewritten for training; see the contract."""
        from sevenn.nn.convolution import (
            IrrepsConvolution,
            IrrepsScatterGatterFusedConvolution,
        )

        def fused(module: Any) -> Any:
            is_convolution = type(module) is IrrepsConvolution
            if not (is_convolution and layers.Convolution.replaces(module.convolution)):
                return layers.drop_in(module)
            # The vendor's place for kernels that gather and sum by themselves.
            new = IrrepsScatterGatterFusedConvolution.from_irreps_convolution(module)
            convolution = layers.Convolution(module.convolution, self.dtype)
            new.convolution = convolution.to(self.device)
            return new

        return layers.rewritten(self.model, fused)

    def path_weights(self) -> list[PathWeight]:
        """Classify every parameter, with the paths of e3nn's own instructions."""
        modules = dict(self.model.named_modules())
        records = []
        for name, parameter in self.model.named_parameters():
            owner, _, _ = name.rpartition(".")
            block = name.partition(".")[0]
            number = block.split("_")[0]
            layer = int(number) if number.isdigit() else None
            role: Role = "interaction"
            if block.startswith(("reduce", "rescale")):
                role = "readout"
            elif layer is None:
                role = "embedding"
            kind, paths = self._kind(name, parameter, modules[owner], block)
            records.append(
                PathWeight(
                    name=name,
                    shape=tuple(parameter.shape),
                    kind=kind,
                    role=role,
                    layer=layer,
                    paths=paths,
                    elements=self.elements
                    if any(p.element_axis is not None for p in paths)
                    else (),
                    heads=self._heads
                    if any(p.head_axis is not None for p in paths)
                    else (),
                    basis_axis=0 if name.endswith(_FROM_BASIS) else None,
                )
            )
        return records

    def _kind(
        self, name: str, parameter: Tensor, module: Any, block: str
    ) -> tuple[Kind, tuple[IrrepsPath, ...]]:
        from e3nn import o3

        if isinstance(module, o3.Linear):
            return "linear", self._irreps_paths(module, block)
        if isinstance(module, o3.TensorProduct):
            return "fctp", self._irreps_paths(module, block)
        if ".weight_nn." in name or block == "edge_embedding":
            return "radial", ()
        if block == "rescale_atomic_energy":
            return "scale_shift", self._species_path(tuple(parameter.shape))
        return "other", ()

    def _species_path(self, shape: tuple[int, ...]) -> tuple[IrrepsPath, ...]:
        """Return the one path of a tensor over the elements (and heads), if it is."""
        if shape[-1] != len(self.elements):
            return ()
        return (
            IrrepsPath(
                0,
                int(np.prod(shape)),
                shape,
                "0e",
                "0e",
                element_axis=len(shape) - 1,
                head_axis=0 if len(shape) == 2 else None,
            ),
        )

    def _irreps_paths(self, module: Any, block: str) -> tuple[IrrepsPath, ...]:
        """Return the paths of a layer; the species enter as an input irrep."""
        from e3nn import o3

        if not isinstance(module, o3.Linear):
            return instruction_paths(module, element_axis=1)
        axis = 0 if block == "onehot_to_feature_x" else None
        paths = instruction_paths(module, element_axis=axis)
        if getattr(self.model._modules[block], "num_modalities", 0) <= 1:
            return paths
        # The vendor appends the one-hot modality as the last input irrep.
        last = len(module.irreps_in) - 1
        weighted = [i for i in module.instructions if i.i_in >= 0]
        return tuple(
            replace(path, head_axis=0 if instruction.i_in == last else None)
            for path, instruction in zip(paths, weighted, strict=True)
        )

    def stored_weights(self) -> Mapping[str, Tensor]:
        """Every named parameter as the checkpoint has it (float32, CPU)."""
        return self._stored

    def _shift_row(self, shift: Tensor) -> Tensor:
        """Return the view of the shift tensor that the active head uses."""
        if shift.dim() == 2:
            assert self.head is not None, "only multi-fidelity models have rows"
            return shift[self._heads.index(self.head)]
        return shift

    def reference_energies(self) -> dict[str, float]:
        """Return the ``rescale_atomic_energy.shift`` of each element (eV)."""
        shift = self._shift_row(self._stored["rescale_atomic_energy.shift"])
        values = shift.double().expand(len(self.elements)).tolist()
        return dict(zip(self.elements, values, strict=True))

    def _shifted(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Merge reference-energy shifts into the vendor's shift tensor."""
        merged = {**self._stored, **weights}
        shift = merged["rescale_atomic_energy.shift"].clone()
        row = self._shift_row(shift)
        if not self.has_shift_by_element:
            if any(shifts.values()):
                raise PathtuneError(
                    f"{self.model_name} has one reference energy for all elements and "
                    "cannot hold shifts by element"
                )
            return merged
        for symbol, value in shifts.items():
            index = self.elements.index(symbol)
            row[index] = float(row[index].double() + value)
        merged["rescale_atomic_energy.shift"] = shift
        return merged

    def _merged_model(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Any:
        merged = self._shifted(weights, shifts)
        with undisturbed(torch.float32):
            warnings.simplefilter("ignore")
            model = self._checkpoint.build_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(merged[name])
        return model

    def save(
        self, path: Path, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> None:
        """Write a SevenNet checkpoint that the vendor's tools load unchanged."""
        import sevenn

        model = self._merged_model(weights, shifts)
        # The vendor re-sorts and re-signs weights of checkpoints older than 0.11 when
        # it loads them. That has happened already, so the file carries the version
        # that wrote it.
        config = self._checkpoint.config | {"version": sevenn.__version__}
        content = {
            "config": config,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": {},
            "scheduler_state_dict": {},
            "epoch": self._checkpoint.epoch,
            "time": self._checkpoint.time,
            "hash": self._checkpoint.hash,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.write_bytes(path, buffer.getvalue())

    def calculator(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float]
    ) -> Calculator:
        """Return a SevenNetCalculator, in the vendor's float32."""
        if self.dtype != torch.float32:
            raise UsageError("SevenNet's calculator works in float32: load with it")
        with undisturbed():
            warnings.simplefilter("ignore")
            from sevenn.calculator import SevenNetCalculator

            return SevenNetCalculator(
                self._merged_model(weights, shifts),
                file_type="model_instance",
                device=self.device,
                modal=self.head,
                sevennet_config=self._config,
            )

    def accelerated(
        self, weights: Mapping[str, Tensor], shifts: Mapping[str, float], name: str
    ) -> Calculator:
        """Return a SevenNetCalculator that has converted the merged checkpoint.

        Raises
        ------
        RuntimeError
            If the vendor would quietly go on without the kernels, as it does where
            there is no GPU.
        """
        with undisturbed(torch.float32), tempfile.TemporaryDirectory() as folder:
            warnings.filterwarnings("ignore")
            warnings.filterwarnings("error", message=".* is requested, but")
            from sevenn.calculator import SevenNetCalculator

            path = Path(folder) / "merged.pth"
            self.save(path, weights, shifts)
            kernels: dict[str, Any] = {f"enable_{name}": True}
            try:
                return SevenNetCalculator(
                    str(path), device=self.device, modal=self.head, **kernels
                )
            except UserWarning as warning:
                raise RuntimeError(str(warning)) from warning


def _symbols(type_map: Mapping[int, int]) -> tuple[str, ...]:
    from ase.data import chemical_symbols

    ordered = sorted(type_map, key=lambda z: type_map[z])
    return tuple(chemical_symbols[z] for z in ordered)
