"""The command line: a thin layer over `pathtune.api`; heavy imports stay inside."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathtune.errors import PathtuneError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from pathtune.deltafile import DeltaFile

app = typer.Typer(
    name="pathtune",
    help="Adapt a pre-trained interatomic potential to your own DFT data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
delta_app = typer.Typer(
    help="Add, subtract, scale and compare delta files.", no_args_is_help=True
)
app.add_typer(delta_app, name="delta")

Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output.")
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Released name (pathtune models) or file.")
]
DeltaOption = Annotated[
    Path | None, typer.Option("--delta", help="delta.safetensors of a run.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="File to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
Head = Annotated[str | None, typer.Option(help="Head (modality) of the model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
Dtype = Annotated[str, typer.Option(help="float32 or float64.")]
Trust = Annotated[
    bool, typer.Option("--trust-checkpoint", help="Open a pickle of unknown hash.")
]
EnergyKey = Annotated[str | None, typer.Option(help="Key of the energies.")]
ForcesKey = Annotated[str | None, typer.Option(help="Key of the forces.")]
StressKey = Annotated[str | None, typer.Option(help="Key of the stress or virials.")]
MagmomsKey = Annotated[str | None, typer.Option(help="Key of the magnetic moments.")]
MagforcesKey = Annotated[str | None, typer.Option(help="Key of the magnetic forces.")]


def main() -> None:
    """Run the command line; errors meant for users are one line and an exit code."""
    # Typer uses click, or its own copy of it, depending on its version.
    click = importlib.import_module(typer.BadParameter.__module__)
    try:
        # typer.Exit comes back as a number: `check` on bad data, --help, Ctrl-C.
        sys.exit(app(standalone_mode=False))
    except PathtuneError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except click.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx else "pathtune"
        _fail(f"{error.format_message()} (see {context} --help)", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except RuntimeError as error:
        # Errors of PyTorch, without importing it.
        if type(error).__name__ == "OutOfMemoryError":
            _fail(
                "the device ran out of memory; lower --batch-size, or let "
                "--max-edges-per-batch auto cut the batch into parts that fit",
                1,
            )
        if "DataLoader worker" in str(error):
            _fail(
                "a process that reads the structures has ended; if the machine is "
                "short of memory, lower --workers and go on with --resume",
                1,
            )
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _fail(message: str, code: int) -> None:
    if _speaks():
        print(f"pathtune: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _is_main() -> bool:
    """Whether this is the one process, or the first of several of a run."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def _speaks() -> bool:
    """Whether this process says why it failed: of several, the first that does."""
    distributed = sys.modules.get("pathtune.training.distributed")
    return distributed.speaks_first() if distributed else _is_main()


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, markup=False)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _keys(**given: str | None) -> dict[Any, str]:
    return {name: key for name, key in given.items() if key is not None}


def _table(
    title: str, columns: list[str], rows: list[list[str]], *, numbers: bool = True
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, column in enumerate(columns):
        justify: Any = "right" if index and numbers else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # The title is a line of its own: a table wraps its title to its own width.
    print(title)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


@app.command()
def models(json_output: Json = False) -> None:
    """List the released models and the file each name stands for."""
    from pathtune import api

    infos = api.models()
    if json_output:
        _print_json([info.to_dict() for info in infos])
        return
    for backend in dict.fromkeys(i.backend for i in infos):
        rows = [[i.name, i.reason, i.checkpoint] for i in infos if i.backend == backend]
        _table(backend, ["name", "where", "checkpoint"], rows, numbers=False)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="Any file ASE reads.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Compare labels with a model.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Test file that must share no frame with DATA.")
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    magmoms_key: MagmomsKey = None,
    magforces_key: MagforcesKey = None,
    head: Head = None,
    device: Device = "auto",
    trust_checkpoint: Trust = False,
    json_output: Json = False,
) -> None:
    """Check labels, units, signs, duplicates and leakage; exit 1 on an error."""
    from ase.data import atomic_numbers

    from pathtune import structures

    keys = _keys(
        energy=energy_key,
        forces=forces_key,
        stress=stress_key,
        magmoms=magmoms_key,
        magforces=magforces_key,
    )
    frames = structures.read(data, keys=keys)
    others = structures.read(against, keys=keys) if against else None
    elements, predictions = None, None
    if model is not None:
        from pathtune import api
        from pathtune.prediction import predict

        backend = api.load(
            model, head=head, device=device, trust_checkpoint=trust_checkpoint
        )
        elements = {atomic_numbers[e] for e in backend.elements}
        survey = structures.survey(frames)
        if set(survey.elements) <= set(backend.elements) and not any(
            survey.is_degenerate
        ):
            chosen = structures.sample(len(frames))
            predicted = predict(backend, structures.take(frames, chosen))
            predictions = structures.spread(predicted, chosen, len(frames))
    report = structures.check(
        frames, elements=elements, predictions=predictions, against=others
    )
    if json_output:
        _print_json(report.to_dict())
    else:
        print(f"{data}: {len(frames)} structures")
        for name, count in structures.label_counts(frames).items():
            if count:
                print(f"  {count} {name}")
        for finding in report.findings:
            print(f"{finding.severity}: {finding.message}")
        print("ok" if report.ok else "not ok")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def finetune(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of settings; flags override it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Released name or file.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="Training frames.")] = None,
    valid: Annotated[
        str | None, typer.Option(help="Validation frames; else 10 % of the training.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test frames.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Run folder.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="sparse, full, elora, lora, dense, ...")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="low (accurate) or high (sparsest).")
    ] = None,
    max_updated_percent: Annotated[
        float | None, typer.Option(help="Most parameters to update (%); takes gradual.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="linear, fctp, all, everything, layer=0-2, l=2, name=..."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps.")] = None,
    max_epochs: Annotated[int | None, typer.Option(help="Or epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Structures a step.")] = None,
    max_atoms_per_batch: Annotated[
        int | None, typer.Option(help="Most atoms in the model at once.")
    ] = None,
    max_edges_per_batch: Annotated[
        str | None, typer.Option(help="Most edges at once, or auto: as memory allows.")
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(help="GiB that auto may take.")
    ] = None,
    stream_above: Annotated[
        float | None, typer.Option(help="Keep files above so many MiB on disk.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read such files.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Rewritten layers; about half the time."
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... or auto.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", help="TF32 products on a GPU.")
    ] = None,
    head: Head = None,
    reference_energies: Annotated[
        str | None,
        typer.Option(help="estimated, foundation, isolated, average or a file."),
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    magmoms_key: MagmomsKey = None,
    magforces_key: MagforcesKey = None,
    spin: Annotated[
        bool | None,
        typer.Option("--spin/--no-spin", help="A spin layer: moments, exchange."),
    ] = None,
    spin_orbit: Annotated[
        bool | None,
        typer.Option(
            "--spin-orbit/--no-spin-orbit", help="One that ties spins to the lattice."
        ),
    ] = None,
    replay: Annotated[
        int | None, typer.Option(help="Structures labelled by the base to train on.")
    ] = None,
    replay_file: Annotated[
        str | None, typer.Option(help="Take them from this file.")
    ] = None,
    replay_weight: Annotated[
        float | None, typer.Option(help="Weight of their loss.")
    ] = None,
    retention: Annotated[
        str | None, typer.Option(help="Measure what was forgotten: none, fast, large.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without gain before stopping.")
    ] = None,
    trust_checkpoint: Trust = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and probe a step.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as a.b=value.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Fine-tune a foundation model on your data; writes a run folder."""
    flags = {k: v for k, v in locals().items() if v is not None}
    from pathtune import api
    from pathtune.config import RunConfig, assign, read_yaml, validate

    for own in (
        "config",
        "dry_run",
        "resume",
        "set_",
        "json_output",
        "max_updated_percent",
        "spin",
        "spin_orbit",
    ):
        flags.pop(own, None)
    if not trust_checkpoint:
        flags.pop("trust_checkpoint")
    settings = (read_yaml(config) if config else {}) | flags
    if spin or spin_orbit:
        settings["spin"] = settings.get("spin") or {}
    elif spin is not None:
        settings["spin"] = None
    if spin_orbit is not None:
        assign(settings, f"spin.spin_orbit={str(spin_orbit).lower()}")
    for assignment in set_ or []:
        assign(settings, assignment)
    if max_updated_percent is not None:
        assign(settings, f"method_options.max_updated_percent={max_updated_percent}")
        begun = resume and (Path(settings.get("output", "")) / api.CONFIG).exists()
        if not begun and not settings.keys() & {"method", "preset"}:
            settings["method"] = "gradual"
    if resume:
        if "output" not in settings:
            raise UsageError("--resume needs --output, the folder of the run")
        run = api.resume_config(Path(settings["output"]), settings)
    else:
        run = validate(RunConfig, settings, "setting")
    if dry_run:
        result = api.dry_run(run, console=_console())
    else:
        result = api.finetune(run, resume=resume, console=_console())
    if not _is_main():
        return
    if json_output:
        _print_json(result)
    elif not dry_run:
        _print_results(Path(run.output), result)


def _print_results(folder: Path, result: Mapping[str, Any]) -> None:
    split = "test" if result["test"] else "valid"
    rows = []
    for key in result[split]:
        if isinstance(result["zero_shot"].get(key), float):
            base, tuned = result["zero_shot"][key], result[split][key]
            gain = f"{base / tuned if tuned else float('inf'):.1f}x" if base else "-"
            digits = 3 if key.endswith("mu_b") else 2
            numbers = [f"{value:.{digits}f}" for value in (base, tuned)]
            rows.append([key, *numbers, gain])
    n = result[split]["n_structures"]
    columns = ["error", "zero-shot", "tuned", "better by"]
    _table(f"{split}: {n} structures", columns, rows)
    sparsity = result["sparsity"]
    new = sparsity.get("new_parameters", 0)
    percent = 100 * sparsity["updated_parameters"] / sparsity["total_parameters"]
    print(
        f"updated {sparsity['updated_parameters']} of {sparsity['total_parameters']} "
        f"parameters ({percent:.2f} %)"
        + (f", {new} of them the spin layer's" if new else "")
    )
    if retained := result.get("retention"):
        _print_retention(retained)
    print(f"run folder: {folder}")
    if (folder / "report.html").exists():
        print(f"report: {folder / 'report.html'}")


def _print_retention(result: Mapping[str, Any]) -> None:
    rows = [[k, f"{v:.2f}"] for k, v in result.items() if isinstance(v, float)]
    dimers, nve = result["dimers"], result["nve"]
    shares = [dimers["base_hole_fraction"], dimers["hole_fraction"]]
    base, tuned = (f"{100 * share:.0f} %" for share in shares)
    rows.append([f"pairs with a hole (base: {base})", tuned])
    if dimers["new_holes"]:
        rows.append(["holes the base has not", ", ".join(dimers["new_holes"])])
    if nve and nve["exploded"]:
        rows.append(["simulation", f"exploded at step {nve['n_steps']}"])
    elif nve:
        key = "energy_drift_mev_per_atom_per_ps"
        rows.append([f"simulation, {key}", f"{nve[key]:.2f}"])
    title = f"retention: {result['n_structures']} structures labelled by the base"
    _table(title, ["against the base", ""], rows)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="HTML file; of one run report.html in its folder."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write the figures into this folder, too.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Of the figures: png, pdf or svg.")
    ] = "png",
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Write the HTML report of a run, or of several side by side."""
    from pathtune import report as reporting

    if output is None and len(runs) > 1:
        output = Path(reporting.REPORT)
    if output is not None and output.exists() and not overwrite:
        raise UsageError(f"{output} exists; add --overwrite to replace it")
    written = reporting.write(runs, output)
    drawn = reporting.write_figures(runs, figures, format_) if figures else []
    verdicts = [reporting.judge(reporting.Run(run)) for run in runs]
    if json_output:
        judged = zip(runs, verdicts, strict=True)
        _print_json(
            {
                "report": str(written),
                "figures": [str(path) for path in drawn],
                "verdicts": [{"run": str(run), **asdict(v)} for run, v in judged],
            }
        )
        return
    for run, verdict in zip(runs, verdicts, strict=True):
        print(f"{run}: {verdict.sentence}")
    if figures:
        print(f"figures: {figures} ({len(drawn)} {format_})")
    print(f"report: {written}")


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Any file ASE reads.")],
    model: Model,
    delta: DeltaOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Predictions, extended XYZ.")
    ] = None,
    overwrite: Overwrite = False,
    orderings: Annotated[
        str | None,
        typer.Option(help="Key that orderings of one structure share, or formula."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Structures at a time.", min=1)] = 16,
    accelerator: Annotated[
        str | None, typer.Option(help="The vendor's kernels: cueq, oeq, flash.")
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    magmoms_key: MagmomsKey = None,
    magforces_key: MagforcesKey = None,
    head: Head = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    trust_checkpoint: Trust = False,
    json_output: Json = False,
) -> None:
    """Predict structures with a model (and a delta); print the errors."""
    from pathtune import api

    result = api.evaluate(
        str(data),
        model,
        delta,
        output=output,
        overwrite=overwrite,
        keys=_keys(
            energy=energy_key,
            forces=forces_key,
            stress=stress_key,
            magmoms=magmoms_key,
            magforces=magforces_key,
        ),
        orderings=orderings,
        batch_size=batch_size,
        accelerator=accelerator,
        console=_console(),
        head=head,
        device=device,
        dtype=dtype,
        trust_checkpoint=trust_checkpoint,
    )
    if json_output:
        _print_json(result)
        return
    numbers = [[k, f"{v:.3f}"] for k, v in result.items() if isinstance(v, float)]
    _table(f"{data}: {result['n_structures']} structures", ["error", ""], numbers)
    parts = {**result.get("by_element", {}), **result.get("by_config_type", {})}
    for name, group in parts.items():
        rows = [[k, f"{v:.3f}"] for k, v in group.items() if isinstance(v, float)]
        _table(f"{name}: {group['n_structures']} structures", ["error", ""], rows)
    if "orderings" in result:
        _print_orderings(result["orderings"])
    if output is not None:
        print(f"predictions: {output}")


def _print_orderings(result: Mapping[str, Any]) -> None:
    columns = ["frame", "predicted", "labelled"]
    for group in result["groups"][:10]:
        labelled = group["labelled"] or [None] * len(group["frames"])
        ranked = sorted(
            zip(group["predicted"], labelled, group["frames"], strict=True),
            key=lambda row: row[:1],
        )
        rows = [
            [str(i), f"{p:+.3f}", "-" if e is None else f"{e:+.3f}"]
            for p, e, i in ranked[:20]
        ]
        _table("orderings of one structure, meV/atom from their mean", columns, rows)
    n, n_frames = result["n_groups"], result["n_structures"]
    print(f"orderings: {n_frames} frames of {n} structure{'s' * (n > 1)}")
    if "spearman" in result:
        rank = result["spearman"]
        error, size = (result[f"difference_{x}_mev_per_atom"] for x in ("mae", "size"))
        print(
            f"energy differences: MAE {error:.3f} of {size:.3f} meV/atom; rank "
            "correlation (Spearman) "
            + (
                "none, the model does not tell them apart"
                if rank is None
                else f"{rank:.3f}"
            )
        )


@app.command()
def merge(
    model: Model,
    delta: Annotated[Path, typer.Option("--delta", help="delta.safetensors.")],
    output: Output,
    overwrite: Overwrite = False,
    head: Head = None,
    trust_checkpoint: Trust = False,
    json_output: Json = False,
) -> None:
    """Write base + delta as the vendor's own file, verified."""
    from pathtune import api

    result = api.merge(
        model,
        delta,
        output,
        overwrite=overwrite,
        console=_console(),
        head=head,
        device="cpu",
        trust_checkpoint=trust_checkpoint,
    )
    if json_output:
        _print_json(result)
    else:
        print(f"merged: {output}")


@app.command()
def inspect(
    delta: Annotated[Path, typer.Argument(help="A delta file.")],
    json_output: Json = False,
) -> None:
    """Show what a delta file changes, and where it comes from."""
    from pathtune.deltafile import DeltaFile

    loaded = DeltaFile.load(delta)
    rows = []
    for name, change in loaded.changes.items():
        record = loaded.metadata.get("tensors", {}).get(name, {})
        rows.append(
            {
                "parameter": name,
                "kind": record.get("kind"),
                "layer": record.get("layer"),
                "updated": len(change.indices),
                "size": change.size,
                "norm": float(change.values.norm()),
                "largest": float(change.values.abs().max()),
            }
        )
    if json_output:
        content = dict(loaded.metadata)
        content.pop("tensors", None)
        content["updated_parameters"] = loaded.updated_parameters
        content["new_parameters"] = loaded.new_parameters
        content["shifts"] = dict(loaded.shifts)
        _print_json(content | {"tensors": rows})
        return
    meta = loaded.metadata
    method = meta.get("method") or {}
    print(f"{delta}: for {meta.get('model')} ({meta.get('backend')})")
    print(f"method: {method.get('name') or meta.get('label')}")
    print(f"elements: {', '.join(meta.get('elements', []))}")
    shifts = ", ".join(f"{e} {v:+.6f}" for e, v in loaded.shifts.items())
    print(f"reference-energy shifts (eV): {shifts or 'none'}")
    if loaded.layer:
        settings = ", ".join(f"{k} {v}" for k, v in meta["spin"].items())
        print(f"spin layer: {loaded.new_parameters} parameters; {settings}")
    _table(
        f"{loaded.updated_parameters} changed entries",
        ["parameter", "kind", "updated", "size", "share", "norm", "largest"],
        [
            [
                str(r["parameter"]),
                str(r["kind"]),
                str(r["updated"]),
                str(r["size"]),
                f"{100 * r['updated'] / r['size']:.1f} %",
                f"{r['norm']:.3g}",
                f"{r['largest']:.3g}",
            ]
            for r in rows
        ],
    )


@app.command()
def explain(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders or delta files; several are compared."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Instead: a native checkpoint or a name ...")
    ] = None,
    tuned: Annotated[
        str | None, typer.Option(help="... and what it was tuned to, of one family.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base, where the run's is not there."),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Undo one part at a time; show errors.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Do that on these frames, not the test frames.")
    ] = None,
    frames: Annotated[int, typer.Option(help="On at most so many.", min=1)] = 100,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for CSV and JSON.")
    ] = None,
    overwrite: Overwrite = False,
    head: Head = None,
    trust_checkpoint: Trust = False,
    json_output: Json = False,
) -> None:
    """Show which layers, degrees and elements a fine-tuning changed."""
    from pathtune import explain as explaining
    from pathtune.explain import show

    sources = runs or []
    if (base is None) != (tuned is None) or bool(sources) == (base is not None):
        raise UsageError("give run folders or delta files, or --base and --tuned")
    if len(sources) != 1 and (ablate or data):
        raise UsageError("--ablate and --data are for one run at a time")
    if output and output.exists() and any(output.iterdir()) and not overwrite:
        raise UsageError(f"{output} is not empty; add --overwrite to write into it")
    options: dict[str, Any] = {"trust_checkpoint": trust_checkpoint}
    if head is not None:
        options["head"] = head
    folder = output
    result: explaining.Explanation | explaining.Comparison
    if base is not None and tuned is not None:
        result = explaining.explain_checkpoints(base, tuned, **options)
    elif len(sources) == 1:
        (source,) = sources
        result = explaining.explain_run(
            source,
            model=model,
            ablate=ablate,
            data=data,
            most_frames=frames,
            console=_console(),
            **options,
        )
        if output is None and source.is_dir():
            folder = source / "explain"
    else:
        result = explaining.compare(
            [
                explaining.explain_run(s, model=model, name=str(s), **options)
                for s in sources
            ]
        )
    if folder is not None:
        result.write(folder)
    if json_output:
        _print_json(result.document)
        return
    if isinstance(result, explaining.Comparison):
        tables = show.comparison(result.document)
    else:
        tables = show.explanation(result.document)
    for table in tables:
        _table(*table)
    for remark in result.document.get("remarks", ()):
        print(remark)
    if folder is not None:
        print(f"tables: {folder}")


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="Run folder or delta file.")],
    target: Annotated[str, typer.Argument(help="Folder, or hf://owner/name.")],
    overwrite: Overwrite = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Share a delta with its model card, in a folder or on the Hugging Face hub."""
    from pathtune import hub

    result = hub.push(source, target, overwrite=overwrite, private=private)
    if json_output:
        _print_json(result)
    else:
        print(f"{result['target']}: {', '.join(result['files'])}")


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="Folder, or hf://owner/name.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Your copy of the base.")
    ] = None,
    overwrite: Overwrite = False,
    trust_checkpoint: Trust = False,
    json_output: Json = False,
) -> None:
    """Fetch a shared delta; check that it is whole and fits the base."""
    from pathtune import hub

    result = hub.pull(
        source,
        output,
        model=model,
        overwrite=overwrite,
        trust_checkpoint=trust_checkpoint,
    )
    if json_output:
        _print_json(result)
        return
    print(f"{result['delta']}: for {result['model']}")
    if not result["base_checked"]:
        print(
            "warning: not compared with the base, which is not here under that name; "
            "give it with --model",
            file=sys.stderr,
        )


@delta_app.command("add")
def delta_add(
    first: Path, second: Path, output: Output, overwrite: Overwrite = False
) -> None:
    """Write FIRST + SECOND."""
    a, b = _load_deltas(first, second)
    _save_delta(a.add(b), output, overwrite)


@delta_app.command("subtract")
def delta_subtract(
    first: Path, second: Path, output: Output, overwrite: Overwrite = False
) -> None:
    """Write FIRST - SECOND."""
    a, b = _load_deltas(first, second)
    _save_delta(a.add(b, sign=-1), output, overwrite)


@delta_app.command("scale")
def delta_scale(
    delta: Path, factor: float, output: Output, overwrite: Overwrite = False
) -> None:
    """Write FACTOR times DELTA (0.5 goes half the way)."""
    import math

    if not math.isfinite(factor):
        raise UsageError(f"the factor is {factor}; give a finite number")
    (loaded,) = _load_deltas(delta)
    _save_delta(loaded.scale(factor), output, overwrite)


@delta_app.command("diff")
def delta_diff(first: Path, second: Path, json_output: Json = False) -> None:
    """Compare the supports and values of two deltas."""
    from pathtune.deltafile import compare

    a, b = _load_deltas(first, second)
    result = compare(a, b)
    if json_output:
        _print_json(result)
        return
    columns = ["parameter", "both", "only first", "only second", "Jaccard", "distance"]
    rows = [
        [
            name,
            str(row["both"]),
            str(row["only_a"]),
            str(row["only_b"]),
            f"{row['jaccard']:.3f}",
            f"{row['relative_distance']:.3f}",
        ]
        for name, row in [*result["tensors"].items(), ("all", result)]
    ]
    _table("changed entries", columns, rows)


def _load_deltas(*paths: Path) -> list[DeltaFile]:
    from pathtune.deltafile import DeltaFile

    return [DeltaFile.load(path) for path in paths]


def _save_delta(delta: DeltaFile, output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; add --overwrite to replace it")
    delta.save(output)
    print(f"{output}: {delta.updated_parameters} changed entries")
