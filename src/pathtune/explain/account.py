"""Explaining one change: a run, a delta file, or two checkpoints of one family."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pathtune import discovery, files, structures
from pathtune.backends.base import Backend
from pathtune.config import RunConfig, read_yaml, validate
from pathtune.deltafile import DeltaFile, exact_change, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.explain import ablation as ablations
from pathtune.explain.cells import CHANNELS, Cells, labels, measure, rows
from pathtune.explain.enrichment import enrichment
from pathtune.explain.tables import order, ranking, tables
from pathtune.loading import load, load_with_delta, models
from pathtune.paths import PathWeight, alive_entries
from pathtune.properties import PROPERTIES, Structure

FORMAT_VERSION = 1
FOLDER, DOCUMENT = "explain", "explain.json"

CHANNELS_NOTE = (
    "s, p, d, f stand for the degree l = 0, 1, 2, 3 of message channels, not for "
    "atomic orbitals. Linear layers mix channels, so a single channel means little: "
    "read layers, degrees and elements. Only weights with an element axis (fully "
    "connected tensor products, element embeddings, contractions) can be read by "
    "element."
)
GUESSED_NOTE = (
    "What could be trained is not recorded here: taken are all weights of the kinds, "
    "and of the elements, that changed."
)
_ABOUT = (
    *("backend", "model", "head", "method", "label", "seed", "select", "elements"),
    *("data", "sparsity"),
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """One explained change.

    Parameters
    ----------
    name
        What people see: the run folder's or file's name.
    delta
        What was changed.
    records
        Every parameter of the base.
    alive
        Parameter name -> flat indices that could be trained.
    cells
        Counts by slice.
    document
        What is written, see `pathtune.explain`.
    """

    name: str
    delta: DeltaFile
    records: Sequence[PathWeight]
    alive: Mapping[str, np.ndarray]
    cells: Cells
    document: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``explain.json`` and a CSV file for every table, each atomically."""
        folder = Path(folder)
        listed = dict(self.document["tables"])
        for name in ("ranking", "enrichment", "orbitals"):
            listed[name] = self.document[name]
        if self.document["ablation"]:
            listed["ablation"] = self.document["ablation"]["rows"]
        for name, table in listed.items():
            if table:
                files.write_text(folder / f"{name}.csv", to_csv(table))
        files.write_json(folder / DOCUMENT, self.document)

    def with_ablation(
        self,
        backend: Backend,
        frames: Sequence[Structure],
        data: str,
        *,
        batch_size: int = 16,
        console: Console | None = None,
    ) -> Explanation:
        """Return the same with ``ablation`` filled in.

        Parameters
        ----------
        backend
            The base.
        frames
            Labelled structures.
        data
            What they are, for people.
        batch_size, console
            See `pathtune.explain.ablation.ablation`.
        """
        measured = ablations.ablation(
            backend,
            self.delta,
            self.cells,
            frames,
            batch_size=batch_size,
            console=console,
        )
        content = {"data": data, "n_structures": len(frames), "rows": measured}
        return dataclasses.replace(
            self, document={**self.document, "ablation": content}
        )


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header; None is an empty field."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def explain(
    backend: Backend,
    delta: DeltaFile,
    *,
    alive: Mapping[str, np.ndarray] | None = None,
    name: str = "delta",
    seed: int = 0,
) -> Explanation:
    """Explain a delta whose base is loaded.

    Parameters
    ----------
    backend
        The base.
    delta
        What was changed.
    alive
        Parameter name -> flat indices that could be trained; without, they follow from
        what the delta says of its run.
    name
        For people.
    seed
        Of the permutation test.

    Raises
    ------
    PathtuneError
        If the delta was made for another base.
    """
    stored = backend.stored_weights()
    delta.require_base(stored)
    records = backend.path_weights()
    is_known = alive is not None or "select" in delta.metadata
    if alive is None:
        alive = trainable(records, delta, backend.head)
    cells = measure(records, stored, delta.changes, alive)
    found = tables(cells)
    remarks = [CHANNELS_NOTE] if any(r["element"] for r in found["element"]) else []
    if not is_known:
        remarks.append(GUESSED_NOTE)
    about = {key: delta.metadata.get(key) for key in _ABOUT}
    document = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "about": {
            **about,
            "shifts": dict(delta.shifts),
            "new_parameters": delta.new_parameters,
        },
        "totals": rows(cells, ())[0],
        "tables": found,
        "ranking": ranking(found["cell"]),
        "enrichment": sorted(enrichment(cells, seed=seed), key=order),
        "orbitals": orbitals(cells, seed=seed),
        "ablation": None,
        "remarks": remarks,
    }
    return Explanation(name, delta, records, alive, cells, document)


def orbitals(cells: Cells, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return the change by element and degree, over element-resolved weights alone.

    Returns
    -------
    list of dict
        ``element``, ``degree``, ``channel``, the counts of
        `pathtune.explain.cells.rows` and the columns of
        `pathtune.explain.enrichment.enrichment`. Channels are not orbitals, see
        `CHANNELS_NOTE`.
    """
    by = ("element", "degree")
    part = cells.where(
        lambda key: key["element"] is not None and key["kind"] != "scale_shift"
    )
    tested = {(r["element"], r["degree"]): r for r in enrichment(part, by, seed=seed)}
    table = []
    for row in rows(part, by):
        if row["alive"]:
            channel = CHANNELS[row["degree"]]
            extra = tested.get((row["element"], row["degree"]), {})
            table.append({**row, "channel": channel, **extra})
    return sorted(
        table, key=lambda row: (order({"element": row["element"]}), order(row))
    )


def trainable(
    records: Sequence[PathWeight], delta: DeltaFile, head: str | None
) -> Mapping[str, np.ndarray]:
    """Return the entries that could be trained, from what a delta says of its run.

    A delta that is no run's (a sum, a difference of checkpoints) does not say; then
    these are all entries of the kinds and elements that changed.
    """
    metadata = delta.metadata
    by_name = {r.name: r for r in records}
    selection = metadata.get("select")
    covered = list(records)
    if selection is None:
        touched = {by_name[name].kind for name in delta.changes}
        selection = ",".join(sorted(touched)) or "all"
    elif method := metadata.get("method", {}).get("name"):
        change = discovery.load("methods", method).Change
        covered = [r for r in records if change.covers(r)]
    found = alive_entries(
        records,
        selection,
        metadata.get("elements") or sorted({e for r in records for e in r.elements}),
        head,
        metadata.get("properties", PROPERTIES),
    )
    kept = {r.name for r in covered}
    return {name: indices for name, indices in found.items() if name in kept}


def explain_run(
    source: Path,
    *,
    model: str | None = None,
    name: str | None = None,
    ablate: bool = False,
    data: str | None = None,
    most_frames: int = 100,
    console: Console | None = None,
    **options: Any,
) -> Explanation:
    """Explain a run folder or a delta file; the base is loaded.

    Parameters
    ----------
    source
        Folder of a finished run, or a delta file.
    model
        The base, where it is not what the run or the delta says.
    name
        For people; that of the folder or file without.
    ablate
        Undo one part of the change at a time, on the run's test frames, or else its
        validation frames.
    data
        Do so on the frames of this file.
    most_frames
        At most so many, spread evenly.
    console
        Where the progress of this is shown.
    **options
        For `pathtune.loading.load`.

    Raises
    ------
    UsageError
        If there is no finished run, the base of a delta is not known by name, or there
        are no frames.
    """
    source = Path(source)
    config = None if source.is_file() else run_config(source)
    delta = DeltaFile.load(source if config is None else source / "delta.safetensors")
    frames, title = None, ""
    if ablate or data:
        run = None if config is None else source
        frames, title = frames_of(run, data, most_frames)
    base = model or (base_name(delta) if config is None else config.model)
    options = {"device": "cpu", **options}
    backend, _ = load_with_delta(base, delta, **options)
    explanation = explain(backend, delta, name=name or source.stem)
    if frames is None:
        return explanation
    return explanation.with_ablation(backend, frames, title, console=console)


def run_config(run: Path) -> RunConfig:
    """Return the settings of a finished run.

    Raises
    ------
    UsageError
        If the folder holds none.
    """
    for name in ("config.yaml", "delta.safetensors"):
        if not (run / name).is_file():
            raise UsageError(
                f"{run} holds no finished run ({name} is missing); give the --output "
                "folder of pathtune finetune, or a delta file"
            )
    return validate(RunConfig, read_yaml(run / "config.yaml"), "setting")


def base_name(delta: DeltaFile) -> str:
    """Return the released name of a delta's base.

    Raises
    ------
    UsageError
        If it was made for a file.
    """
    name = str(delta.metadata.get("model"))
    if name not in {info.name for info in models()}:
        raise UsageError(
            f"this delta was made for {name!r}, which is no released model; give the "
            "checkpoint with --model"
        )
    return name


def explain_checkpoints(base: str, tuned: str, **options: Any) -> Explanation:
    """Explain the difference of two native checkpoints of one family.

    Parameters
    ----------
    base, tuned
        Released names or files.
    **options
        For `pathtune.loading.load`.

    Raises
    ------
    PathtuneError
        If the two are of different families or architectures.
    """
    options = {"device": "cpu", **options}
    before, after = load(base, **options), load(tuned, **options)
    if before.name != after.name:
        raise PathtuneError(
            f"{base} is a {before.name} model, {tuned} a {after.name} model; "
            "compare two of one family"
        )
    old, new = before.stored_weights(), after.stored_weights()
    for name in [*old, *new]:
        shapes = [tuple(w[name].shape) if name in w else "absent" for w in (old, new)]
        if shapes[0] != shapes[1]:
            raise PathtuneError(
                f"{base} and {tuned} differ in architecture, first in {name!r}: "
                f"{shapes[0]} and {shapes[1]}"
            )
    changes = {n: exact_change(w, new[n].to(w.dtype)) for n, w in old.items()}
    changes = {name: change for name, change in changes.items() if len(change.indices)}
    energies = before.reference_energies()
    shifts = {
        element: value - energies[element]
        for element, value in after.reference_energies().items()
        if value != energies[element]
    }
    elements = set()
    for record in before.path_weights():
        if record.name not in changes:
            continue
        keys, owner = labels(record)
        changed = owner[changes[record.name].indices.numpy()]
        if record.kind != "scale_shift":
            elements |= {keys[i]["element"] for i in np.unique(changed)} - {None}
            continue
        # Fitted reference energies are listed apart, as in a delta.
        expected = [shifts.get(keys[i]["element"], 0.0) for i in changed]
        if np.allclose(changes[record.name].values.numpy(), expected, rtol=1e-6):
            del changes[record.name]
    metadata = {
        "backend": before.name,
        "model": before.model_name,
        "head": before.head,
        "label": f"{after.model_name} - {before.model_name}",
        "base": fingerprint(old),
        "elements": sorted(elements),
    }
    return explain(before, DeltaFile(changes, shifts, metadata), name=after.model_name)


def frames_of(
    run: Path | None, data: str | None, most: int
) -> tuple[Sequence[Structure], str]:
    """Return frames for an ablation, at most so many, spread evenly; and which.

    Parameters
    ----------
    run
        Folder of a run; without `data` its test or validation frames, which lie there
        with the predictions, or where its settings say.
    data
        Another file.
    most
        Number of frames.

    Raises
    ------
    UsageError
        If there are none.
    """
    config = run_config(run) if run else None
    keys = config.label_keys if config else None
    if data is None and run is not None and config is not None:
        kept = [run / "predictions" / f"{part}.xyz" for part in ("test", "valid")]
        own = [Path(file) for file in (config.test, config.valid) if file]
        data = next((str(file) for file in [*kept, *own] if file.is_file()), None)
        keys = None if data and Path(data) in kept else keys
    if data is None:
        raise UsageError(
            "there are neither test nor validation frames to measure on; name a file "
            "with --data"
        )
    found = structures.read(data, keys=keys)
    if len(found) > most:
        chosen = np.linspace(0, len(found) - 1, most).astype(int).tolist()
        found = structures.take(found, chosen)
    return found, Path(data).name
