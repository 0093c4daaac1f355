"""The report of a run: one self-contained HTML page, and its figures as files.

Everything is drawn from run folders; no model is loaded. ``report.html`` opens with
the verdict (`pathtune.report.verdict`) and needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pathtune import files
from pathtune.errors import UsageError, unknown
from pathtune.report import page
from pathtune.report.drawing import FORMATS, save, style
from pathtune.report.run import Run
from pathtune.report.verdict import Verdict, judge

__all__ = ["REPORT", "Run", "Verdict", "judge", "write", "write_figures"]

REPORT = "report.html"


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Parameters
    ----------
    folders
        Finished run folders.
    output
        File to write; ``report.html`` in the run folder of a single run.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UsageError
        If a folder holds no finished run, or several come without an output.
    """
    runs = [Run(folder) for folder in folders]
    if output is None:
        if len(runs) > 1:
            raise UsageError("a report of several runs needs --output FILE")
        output = runs[0].folder / REPORT
    with style():
        text = page.of_run(runs[0]) if len(runs) == 1 else page.of_runs(runs)
    files.write_text(Path(output), text)
    return Path(output)


def write_figures(
    folders: Sequence[Path], target: Path, kind: str = "png"
) -> list[Path]:
    """Write the figures of one run, or of the comparison of several, as files.

    Parameters
    ----------
    folders
        Finished run folders.
    target
        Folder for the figures; one file each, named like the figure.
    kind
        svg, png or pdf.

    Raises
    ------
    UsageError
        If the format is another one.
    """
    if kind not in FORMATS:
        raise UsageError(unknown("format", kind, FORMATS))
    runs = [Run(folder) for folder in folders]
    written = []
    with style():
        drawn = page.drawings(runs[0]) if len(runs) == 1 else page.comparisons(runs)
        for name, drawing in drawn.items():
            path = Path(target) / f"{name}.{kind}"
            save(drawing, path)
            written.append(path)
    return written
