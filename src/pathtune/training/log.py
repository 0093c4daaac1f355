"""What a run tells: progress bar, readable lines, metrics.jsonl, extra loggers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pathtune import files
from pathtune.errors import PathtuneError, UsageError
from pathtune.metrics import summary


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record under slash-separated names."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


class RunLog:
    """The log of one run; a context manager.

    Parameters
    ----------
    folder
        Run folder; None writes nothing.
    console
        Where people read (standard error).
    total_steps
        Length of the bar.
    start_step
        First step of this process; later lines of an earlier process are dropped.
    loggers
        ``tensorboard``, ``wandb``.
    """

    def __init__(
        self,
        folder: Path | None,
        console: Console,
        *,
        total_steps: int,
        start_step: int,
        loggers: tuple[str, ...] = (),
    ) -> None:
        self._console = console
        self._path = folder / "metrics.jsonl" if folder else None
        self.last_step = -1
        if self._path:
            kept = [r for r in read_metrics(self._path) if r["step"] <= start_step]
            files.write_text(self._path, "".join(json.dumps(r) + "\n" for r in kept))
            self.last_step = kept[-1]["step"] if kept else -1
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=start_step, status=""
        )
        self._writers = [_writer(name, folder) for name in loggers if folder]

    def __enter__(self) -> RunLog:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar and close the loggers."""
        self._progress.stop()
        for writer in self._writers:
            writer.close()

    def advance(self, loss: float) -> None:
        """Move the bar by one step."""
        self._progress.update(self._task, advance=1, description=f"loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Record one evaluation: a JSON line, a readable line, the extra loggers."""
        if self._path is None:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PathtuneError(
                f"cannot write {self._path}: {error.strerror}; make room and go on "
                "with --resume"
            ) from error
        parts = [f"step {record['step']:>6}"]
        if record["train_loss"] is not None:
            parts.append(f"loss {record['train_loss']:.4f}")
        parts.append(f"valid loss {record['valid_loss']:.4f}")
        percent = 100 * (1 - record["sparsity"]["total_sparsity"])
        status = [*summary(record["valid"]), f"{percent:.2f} % updated"]
        best = ["best"] if record["best"] else []
        self.say("  ".join([*parts, *status, *best]))
        self._progress.update(self._task, status="  ".join(status))
        for writer in self._writers:
            writer.write(flatten(record), record["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl; a torn last line is dropped.

    Raises
    ------
    PathtuneError
        If another line is no record of an evaluation.
    """
    if not path.exists():
        return []
    records = []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = dict(json.loads(line))
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise PathtuneError(
                f"{path}:{number} is no record of an evaluation; the file is damaged: "
                "delete it to go on without the earlier records"
            ) from error
        records.append(record)
    return records


class _TensorBoard:
    def __init__(self, module: Any, folder: Path) -> None:
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, module: Any, folder: Path) -> None:
        self._run = module.init(project="pathtune", name=folder.name, dir=str(folder))

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_WRITERS = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
}


def require_loggers(names: Iterable[str]) -> None:
    """Refuse extra loggers that cannot be imported, before a run folder exists.

    Raises
    ------
    UsageError
        Naming what to install.
    """
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(_WRITERS[name][0])
    except ImportError as error:
        raise UsageError(
            f"logger {name!r} is not installed: pip install 'pathtune[{name}]'"
        ) from error


def _writer(name: str, folder: Path) -> Any:
    return _WRITERS[name][1](_module(name), folder)
