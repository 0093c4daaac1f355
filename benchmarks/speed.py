"""Time and memory of a training step: pathtune's, and the vendor's own trainer's.

    python benchmarks/speed.py 7net-0 --data DATA --protocol rmd17-50/aspirin --batch 5
    python benchmarks/speed.py 7net-0 --protocol crystals/8 crystals/32 --batch 1 4

All rows take turns in one process, step by step, on the same frames in the same
batches, in float32 and with the same number of threads; the ratio to pathtune's step is
taken within each turn. Start-up and memory are measured in a process for each row.
A step is everything that is done for a batch in a run: loading, collating, prediction,
derivatives, optimizer, and the training errors where the vendor's trainer keeps them.
MODEL is a released name, a checkpoint, or ``mace-medium-random.model``: the published
medium size with random weights, which cost as much as trained ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import protocols
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator

from pathtune import delta as deltas
from pathtune import discovery, structures
from pathtune.config import RunConfig
from pathtune.loading import load
from pathtune.provenance import environment, versions
from pathtune.training import compiled, memory, optimizer
from pathtune.training.data import Batch, Frames, Source
from pathtune.training.loop import training_step

HERE = Path(__file__).resolve().parent
RANDOM_MACE = "mace-medium-random.model"
WARM_UP = 3
ALLOCATOR = "pathtune, allocator left alone"
START = "rewriting_and_proof_seconds"
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What a step is measured on.

    Parameters
    ----------
    model
        Name or file.
    frames
        File of labelled structures, in the order of the batches.
    batch
        Structures in a step.
    has_stress
        Whether stress is trained.
    device
        PyTorch device.
    """

    model: str
    frames: str
    batch: int
    has_stress: bool
    device: str


@dataclass(frozen=True)
class Row:
    """One way to do a step.

    Parameters
    ----------
    build
        Case -> function that does the next step, and what is reported of its start.
    keeps_memory
        Whether its process asks the allocator to keep freed memory, as our runs do.
    """

    build: Callable[[Case], tuple[Step, dict[str, float]]]
    keeps_memory: bool = False


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Repeat a data loader for ever."""
    while True:
        yield from batches


def pathtune(
    case: Case, method: str = "sparse", rewritten: bool = True
) -> tuple[Step, dict[str, float]]:
    """Return a step of ``pathtune finetune``."""
    backend = load(case.model, device=case.device, trust_checkpoint=True)
    read = structures.read(case.frames)
    frames = Frames.prepare(backend, list(read))
    config = RunConfig(model=case.model, train=case.frames, batch_size=case.batch)
    names = ["energy", "forces", *["stress"] * case.has_stress]
    properties = {name: config.loss_weights[name] for name in names}
    module = discovery.load("methods", method)
    delta = deltas.build(
        backend.path_weights(),
        dict(backend.model.named_parameters()),
        method=module,
        config=module.Config(),
        selection=module.Config.select,
        elements=list(frames.survey.elements),
        head=backend.head,
        seed=0,
        properties=names,
    )
    started = time.perf_counter()
    if rewritten:
        sample = frames.part(range(min(4, case.batch)))
        compiled.enable(backend, delta, sample.graphs, properties)
    start = {START: time.perf_counter() - started}
    opt = optimizer.build(delta.change.param_groups(), 10)
    starts = range(0, len(frames) - case.batch + 1, case.batch)
    batches = endless([list(range(i, i + case.batch)) for i in starts])

    def step() -> None:
        rows = next(batches)
        taken = Batch(Source(frames, properties), rows, [frames.part(rows)])
        training_step(delta, opt, [taken], config)

    return step, start if rewritten else {}


def sevenn_train(case: Case, kernels: str = "") -> tuple[Step, dict[str, float]]:
    """Return a step of ``sevenn train`` with its preset ``fine_tune``."""
    import sevenn
    from sevenn.error_recorder import ErrorRecorder
    from sevenn.logger import Logger
    from sevenn.main.sevenn import global_config
    from sevenn.model_build import build_E3_equivariant_model
    from sevenn.parse_input import read_config_yaml
    from sevenn.scripts.processing_continue import processing_continue_v2
    from sevenn.scripts.train import loader_from_config
    from sevenn.train import graph_dataset
    from sevenn.train.trainer import Trainer
    from sevenn.util import load_checkpoint

    folder = Path(tempfile.mkdtemp(dir=Path(case.frames).parent))
    preset = Path(sevenn.__file__).parent / "presets" / "fine_tune.yaml"
    given = yaml.safe_load(preset.read_text(encoding="utf-8"))
    given["model"] = load_checkpoint(case.model).yaml_dict("continue")["model"]
    given["train"]["continue"]["checkpoint"] = case.model
    given["train"] |= {"is_train_stress": case.has_stress, "train_shuffle": False}
    given["data"] = {"batch_size": case.batch, "load_trainset_path": [case.frames]}
    (folder / "input.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    with Logger(filename=str(folder / "log.sevenn"), screen=False):
        config = dict(global_config)
        for part in read_config_yaml(str(folder / "input.yaml")):
            config |= part
        config |= {"is_ddp": False, "device": case.device, "rank": 0, "world_size": 1}
        config |= _SEVENNET_KERNELS[kernels]
        states, _ = processing_continue_v2(config)
        dataset = graph_dataset.from_config(config, str(folder))["trainset"]
        loader = loader_from_config(config, dataset, is_train=True)
        trainer = Trainer.from_config(build_E3_equivariant_model(config), config)
        trainer.load_state_dicts(*states, strict=False)
    recorder = ErrorRecorder.from_config(config, trainer.loss_functions)
    batches = endless(loader)
    return lambda: trainer.run_one_epoch([next(batches)], True, recorder), {}


# What `sevenn train` sets for its options --enable_...
_SEVENNET_KERNELS: dict[str, dict[str, Any]] = {
    "": {},
    "cueq": {"cuequivariance_config": {"use": True}},
    "flash": {"use_flash_tp": True},
    "oeq": {"use_oeq": True},
}


def mace_run_train(case: Case, *options: str) -> tuple[Step, dict[str, float]]:
    """Return a step of ``mace_run_train``; fine-tuning without replay."""
    from mace import data, tools
    from mace.cli.convert_e3nn_cueq import run as to_cueq
    from mace.cli.convert_e3nn_oeq import run as to_oeq
    from mace.modules.lora import inject_LoRAs
    from mace.tools import scripts_utils as scripts
    from mace.tools import torch_geometric
    from mace.tools.model_script_utils import configure_model
    from mace.tools.train import take_step

    arguments = ["--name=speed", "--E0s=foundation", "--default_dtype=float32"]
    arguments += ["--energy_key=energy", "--forces_key=forces", "--stress_key=stress"]
    arguments += [f"--loss={'stress' if case.has_stress else 'weighted'}", *options]
    arguments += [f"--batch_size={case.batch}", f"--device={case.device}"]
    args = tools.build_default_arg_parser().parse_args(arguments)
    args, _ = tools.check_args(args)
    tools.set_default_dtype(args.default_dtype)
    device = tools.init_device(args.device)
    foundation = torch.load(case.model, map_location=device, weights_only=False)
    keys = data.update_keyspec_from_kwargs(data.KeySpecification(), vars(args))
    _, frames = data.load_from_xyz(case.frames, keys)
    table = foundation.atomic_numbers.tolist()
    if not args.foundation_model_elements:
        table = sorted({int(z) for frame in frames for z in frame.atomic_numbers})
    known = foundation.atomic_numbers.tolist()
    energies = np.atleast_2d(
        foundation.atomic_energies_fn.atomic_energies.cpu().numpy()
    )[:, [known.index(z) for z in table]]
    elements = tools.AtomicNumberTable(table)
    graphs = [
        data.AtomicData.from_config(
            frame, elements, foundation.r_max.item(), ["Default"]
        )
        for frame in frames
    ]
    loader = torch_geometric.dataloader.DataLoader(
        graphs, batch_size=args.batch_size, drop_last=True
    )
    args.compute_energy, args.compute_dipole = True, False
    args.compute_polarizability = False
    loss = scripts.get_loss_fn(args, False, False)
    model, outputs = configure_model(
        args, loader, energies, foundation, ["Default"], elements
    )
    model.to(device)
    if args.lora:
        model = inject_LoRAs(model, rank=args.lora_rank, alpha=args.lora_alpha)
    if args.enable_cueq:
        model = to_cueq(model, device=device)
    if args.enable_oeq:
        model = to_oeq(model, device=device)
    opt = scripts.get_optimizer(args, scripts.get_params_options(args, model))
    batches = endless(loader)

    def step() -> None:
        batch = next(batches)
        take_step(model, loss, batch, opt, None, outputs, args.clip_grad, device)

    return step, {}


def nequip_train(
    case: Case, compile_mode: str = "eager"
) -> tuple[Step, dict[str, float]]:
    """Return a step of ``nequip-train``, without the overhead of Lightning's loop."""
    from nequip.data import AtomicDataDict
    from nequip.data.dataset import ASEDataset
    from nequip.data.transforms import (
        ChemicalSpeciesToAtomTypeMapper,
        NeighborListTransform,
    )
    from nequip.scripts._workflow_utils import set_workflow_state
    from nequip.train import NequIPLightningModule
    from nequip.utils.global_state import set_global_state
    from torch.utils.data import DataLoader

    set_workflow_state("train")
    set_global_state()
    kind = "EnergyForceStressLoss" if case.has_stress else "EnergyForceLoss"
    module = NequIPLightningModule(
        model={
            "_target_": "nequip.model.ModelFromPackage",
            "package_path": case.model,
            "compile_mode": compile_mode,
        },
        num_datasets={"train": 1, "val": 0, "test": 0, "predict": 0},
        optimizer={"_target_": "torch.optim.Adam", "lr": 0.001},
        loss={"_target_": f"nequip.train.{kind}", "per_atom_energy": True},
    ).to(case.device)
    model = module.model["sole_model"]
    dataset = ASEDataset(
        case.frames,
        transforms=[
            ChemicalSpeciesToAtomTypeMapper(model.type_names),
            NeighborListTransform(float(model.metadata["r_max"])),
        ],
    )
    batches = endless(
        DataLoader(dataset, case.batch, collate_fn=AtomicDataDict.batched_from_list)
    )
    opt = module.configure_optimizers()
    module.train()

    def step() -> None:
        with default_dtype(torch.float64):
            batch = AtomicDataDict.to_(next(batches), torch.device(case.device))
            loss = module.training_step(batch, 0)
            opt.zero_grad()
            loss.backward()
            opt.step()

    torch.set_default_dtype(torch.float32)
    return step, {}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """NequIP sets this for good; the other rows of the process are not to see it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OURS = {
    "pathtune": Row(pathtune, keeps_memory=True),
    "pathtune --no-compile": Row(lambda c: pathtune(c, rewritten=False), True),
    "pathtune --method full": Row(lambda c: pathtune(c, "full"), True),
    ALLOCATOR: Row(pathtune),
}
ALL_ELEMENTS = "--foundation_model_elements=True"
VENDORS: dict[str, dict[str, Row]] = {
    "sevennet": {
        "sevenn train": Row(sevenn_train),
        "sevenn train --enable_cueq": Row(lambda c: sevenn_train(c, "cueq")),
        "sevenn train --enable_flash": Row(lambda c: sevenn_train(c, "flash")),
        "sevenn train --enable_oeq": Row(lambda c: sevenn_train(c, "oeq")),
    },
    "mace": {
        "mace_run_train": Row(lambda c: mace_run_train(c, ALL_ELEMENTS)),
        "mace_run_train --lora": Row(
            lambda c: mace_run_train(c, ALL_ELEMENTS, "--lora=True")
        ),
        # Its default: the table of elements is cut to those of the data.
        "mace_run_train, elements cut": Row(mace_run_train),
        "mace_run_train --enable_cueq": Row(
            lambda c: mace_run_train(c, ALL_ELEMENTS, "--enable_cueq=True")
        ),
        "mace_run_train --enable_oeq": Row(
            lambda c: mace_run_train(c, ALL_ELEMENTS, "--enable_oeq=True")
        ),
    },
    "nequip": {
        "nequip-train": Row(nequip_train),
        "nequip-train, compiled": Row(lambda c: nequip_train(c, "compile")),
    },
}


def seconds(step: Step, device: str) -> float:
    """Return how long one step takes."""
    _finish(device)
    started = time.perf_counter()
    step()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def describe(model: str, frames: str, batch: int, device: str) -> dict[str, Any]:
    """Say what can be measured here, and how many edges a batch has.

    Compiling takes minutes: it is measured only if asked for.
    """
    if Path(model).name == RANDOM_MACE:
        write_random_mace(Path(model))
    backend = load(model, device="cpu", trust_checkpoint=True)
    rows = [*OURS, *VENDORS.get(backend.name, {})]
    for kernels, package in backend.accelerators.items():
        there = importlib.util.find_spec(package) is not None
        if not (there and device.startswith("cuda")):
            rows = [name for name in rows if not name.endswith(f"--enable_{kernels}")]
    counts = [backend.n_edges(backend.graph(a)) for a in ase.io.read(frames, ":")]
    return {
        "family": backend.name,
        "parameters": backend.total_parameters,
        "rows": [name for name in rows if not name.endswith("compiled")],
        "edges_per_batch": batch * float(np.mean(counts)),
    }


def alone(case: Case, row: Row, turns: int, launched: float) -> dict[str, float]:
    """Measure the start and the memory of one row, in a process of its own."""
    if row.keeps_memory:
        memory.keep_freed_memory()
    device = torch.device(case.device)
    step, found = row.build(case)
    found["peak_mib_before"] = memory.peak_mib(device)
    found["first_step_seconds"] = seconds(step, case.device)
    found["launch_to_first_step_seconds"] = time.time() - launched
    times = [seconds(step, case.device) for _ in range(turns)]
    found["seconds_per_step"] = float(np.median(times))
    found["peak_mib"] = memory.peak_mib(device)
    return found


def together(case: Case, rows: Mapping[str, Row], turns: int) -> dict[str, Any]:
    """Measure rows in turns."""
    memory.keep_freed_memory()  # for all of them: what the others gain is theirs
    steps = {name: row.build(case)[0] for name, row in rows.items()}
    times = np.array(
        [
            [seconds(step, case.device) for step in steps.values()]
            for _ in range(WARM_UP + turns)
        ]
    )[WARM_UP:]
    found: dict[str, Any] = {
        "seconds_per_step": _quartiles(steps, times),
        "ratio_to_first_row": _quartiles(steps, times / times[:, :1]),
    }
    if case.device.startswith("cuda"):
        found["share_in_kernels"] = {
            name: share_in_kernels(step, case.device) for name, step in steps.items()
        }
    return found


def _quartiles(names: Iterable[str], values: np.ndarray) -> dict[str, list[float]]:
    """Return first quartile, median and third quartile of each column."""
    columns = np.percentile(values, [25, 50, 75], axis=0).T.tolist()
    return dict(zip(names, columns, strict=True))


def share_in_kernels(step: Step, device: str) -> float:
    """Return the share of three steps in which the GPU computes."""
    with torch.profiler.profile() as profile:
        whole = sum(seconds(step, device) for _ in range(3))
    busy = sum(event.self_device_time_total for event in profile.key_averages())
    return busy / 1e6 / whole


def write_frames(
    protocol: str, data: Path, batch: int, n_batches: int, folder: Path
) -> dict[str, Any]:
    """Draw the frames of some batches from the training frames, and write them.

    Energies are made relative to their mean per atom: no reference energies are fitted
    here, and the losses would explode.
    """
    protocols.write(protocol, data, folder)
    read = structures.read(folder / "train.xyz")
    drawn = np.random.default_rng(0).permutation(len(read))
    chosen = [read[i] for i in drawn[: batch * min(n_batches, len(read) // batch)]]
    mean = np.mean([s.labels["energy"] / s.n_atoms for s in chosen])
    frames = []
    for structure in chosen:
        atoms = structure.atoms.copy()
        relative = structure.labels["energy"] - mean * structure.n_atoms
        labels = {**structure.labels, "energy": float(relative)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(folder / "frames.xyz", frames, format="extxyz")
    return {
        "batch": batch,
        "batches": len(chosen) // batch,
        "atoms_per_batch": batch * float(np.mean([s.n_atoms for s in chosen])),
        "has_stress": all("stress" in s.labels for s in chosen),
    }


def write_random_mace(path: Path) -> None:
    """Write a MACE of the size of MP-0b3 medium, its elements included."""
    from mace import modules

    o3 = modules.models.o3  # e3nn 0.4.4 can be imported only after MACE
    torch.manual_seed(0)
    blocks = "RealAgnosticDensity{}InteractionBlock"
    numbers = sorted({*range(1, 95)} - {*range(84, 89)})
    model = modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=10,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls_first=modules.interaction_classes[blocks.format("")],
        interaction_cls=modules.interaction_classes[blocks.format("Residual")],
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps("128x0e+128x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(numbers)),
        avg_num_neighbors=1.0,
        atomic_numbers=numbers,
        correlation=3,
        pair_repulsion=True,
        distance_transform="Agnesi",
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    torch.save(model, path)


def child(what: str, **settings: Any) -> Any:
    """Run `describe`, `alone` or `together` in a process of its own."""
    # Their peak of memory starts at the size of this one, which is kept small.
    line = [sys.executable, __file__, "--child", what, json.dumps(settings)]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer(what: str, settings: dict[str, Any]) -> Any:
    """Do what `child` was asked."""
    warnings.simplefilter("ignore")
    if what == "describe":
        return describe(**settings)
    case = Case(**settings["case"])
    rows = OURS | VENDORS.get(settings["family"], {})
    chosen = {name: rows[name] for name in settings["rows"]}
    if what == "together":
        return together(case, chosen, settings["turns"])
    (row,) = chosen.values()
    return alone(case, row, settings["turns"], settings["launched"])


def measure(case: Case, rows: Sequence[str], family: str, turns: int) -> dict[str, Any]:
    """Return everything about one case."""
    shared = {"case": asdict(case), "family": family}
    starts: dict[str, list[Any]] = {}
    for name in rows:
        # A second start shows what the first one has left behind: nothing.
        starts[name] = [
            child("alone", rows=[name], turns=5, launched=time.time(), **shared)
            for _ in range(2 if name == rows[0] else 1)
        ]
    compared = [name for name in rows if name != ALLOCATOR]
    found = child("together", rows=compared, turns=turns, **shared)
    took = {name: median for name, (_, median, _) in found["seconds_per_step"].items()}
    start = starts[rows[0]][0].get(START, 0.0)
    found["steps_to_break_even"] = {
        name: start / (took[name] - took[rows[0]])
        for name in compared
        if took[name] > took[rows[0]]
    }
    return found | {"alone": starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help=f"name, file, or {RANDOM_MACE}")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of data sets")
    parser.add_argument("--protocol", nargs="+", default=["crystals/8"])
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument("--rows", nargs="+", help="the first one is the reference")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--batches", type=int, default=8, help="different batches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", help="of the file below results/")
    given = parser.parse_args()
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "environment": environment() | {"machine": platform.machine()},
        "load_average": [os.getloadavg()[0]],
        "cases": [],
    }
    vendors = versions("mace-torch", "nequip", "torch_geometric", "lightning")
    results["environment"]["versions"] |= vendors
    for protocol, batch in itertools.product(given.protocol, given.batch):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            os.environ["PATHTUNE_HOME"] = temporary  # trust is not remembered
            is_random = given.model == RANDOM_MACE
            model = str(folder / RANDOM_MACE) if is_random else given.model
            drawn = write_frames(protocol, given.data, batch, given.batches, folder)
            frames = str(folder / "frames.xyz")
            case = Case(model, frames, batch, drawn["has_stress"], given.device)
            told = child(
                "describe",
                model=model,
                frames=frames,
                batch=batch,
                device=given.device,
            )
            possible = told.pop("rows")
            rows = given.rows or possible
            found = measure(case, rows, told["family"], given.turns)
        results["cases"].append({"protocol": protocol, **told, **drawn, **found})
        print(json.dumps(results["cases"][-1], indent=2), flush=True)
    results["load_average"].append(os.getloadavg()[0])
    name = given.name or f"speed-{Path(given.model).name}"
    text = json.dumps(results, indent=2).replace(str(given.data.resolve()), "DATA")
    (HERE / "results" / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(answer(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        main()
