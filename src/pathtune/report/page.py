"""The page: what a run folder holds, put into the template."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from pathtune import discovery
from pathtune.report import outliers
from pathtune.report.drawing import PALETTE, Drawing, inline_svg, readings
from pathtune.report.run import QUANTITIES, Run, mae
from pathtune.report.verdict import judge

if TYPE_CHECKING:
    from jinja2 import Environment

#: Parts of the page that figures belong to, in their order.
SECTIONS = ("parity", "errors", "training", "change", "safety")
#: Of several runs side by side, as long as there are not more than `MOST_BESIDE`.
BESIDE = ("parity_forces", "updated_paths", "short_range")
MOST_BESIDE = 4
MOST_RANKED = 8

_LEVELS = {
    "good": ("✓", "Good"),
    "caution": ("!", "Caution"),
    "bad": ("×", "Problem"),
    "unknown": ("?", "Unknown"),
}


@dataclass(frozen=True)
class Figure:
    """A drawing as the template takes it."""

    id: str
    name: str
    title: str
    caption: str
    svg: str
    readings: Sequence[tuple[float, float, str]]
    series: Mapping[str, str]


def drawings(run: Run) -> dict[str, Drawing]:
    """Return the figures of a run that have something to draw, by name."""
    modules = {
        name: discovery.load("report.figures", name)
        for name in discovery.names("report.figures")
    }
    ordered = sorted(modules, key=lambda name: SECTIONS.index(modules[name].SECTION))
    drawn = {name: modules[name].draw(run) for name in ordered}
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def comparisons(runs: Sequence[Run]) -> dict[str, Drawing]:
    """Return the figures of several runs together, by name."""
    drawn = {
        name: discovery.load("report.comparisons", name).draw(runs)
        for name in discovery.names("report.comparisons")
    }
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def of_run(run: Run) -> str:
    """Return the page of one run."""
    drawn = drawings(run)
    sections: dict[str, list[Figure]] = {name: [] for name in SECTIONS}
    for name, drawing in drawn.items():
        section = discovery.load("report.figures", name).SECTION
        sections[section].append(_figure(name, drawing))
    return _render(
        "run.html",
        run=run,
        verdict=judge(run),
        errors=_errors(run),
        figures=sections,
        outliers=outliers.listing(run),
        outlier_factor=outliers.FACTOR,
        parameters=(run.explanation or {}).get("tables", {}).get("parameter", []),
        ranking=_ranking(run),
        remarks=(run.explanation or {}).get("remarks", []),
        data=run.results.get("data", {}),
        references=_references(run),
        facts=_facts(run),
    )


def of_runs(runs: Sequence[Run]) -> str:
    """Return the page that shows several runs side by side."""
    beside: dict[str, list[tuple[Run, Figure | None]]] = {}
    if len(runs) <= MOST_BESIDE:
        for index, run in enumerate(runs):
            drawn = drawings(run)
            for name in BESIDE:
                figure = (
                    _figure(f"run{index}-{name}", drawn[name])
                    if name in drawn
                    else None
                )
                beside.setdefault(name, []).append((run, figure))
    beside = {n: row for n, row in beside.items() if any(f for _, f in row)}
    settings = {
        key: [run.config.get(key) for run in runs]
        for key in runs[0].config
        if key != "output"
    }
    together = [_figure(name, drawing) for name, drawing in comparisons(runs).items()]
    return _render(
        "runs.html",
        runs=runs,
        verdicts=[judge(run) for run in runs],
        errors=[_errors(run) for run in runs],
        facts=[_facts(run) for run in runs],
        figures=together,
        beside=beside,
        most_beside=MOST_BESIDE,
        settings={k: v for k, v in settings.items() if len(set(map(str, v))) > 1},
    )


def _figure(name: str, drawing: Drawing) -> Figure:
    svg = inline_svg(drawing, name)
    return Figure(
        id=name,
        name=name,
        title=drawing.title,
        caption=drawing.caption,
        svg=svg,
        readings=readings(drawing),
        series={f"{name}-{gid}": label for gid, label in drawing.series.items()},
    )


def _errors(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the table of errors, zero-shot and tuned."""
    rows = []
    for name in run.properties:
        quantity = QUANTITIES[name]
        before, after = mae(run.before, name), mae(run.after, name)
        key = quantity.error.replace("_mae_", "_rmse_")
        to_unit = after / run.after[quantity.error] if after else 1.0
        rows.append(
            {
                "title": quantity.title,
                "unit": quantity.unit,
                "before": before,
                "after": after,
                "factor": before / after if after else None,
                "rmse": to_unit * run.after[key] if key in run.after else None,
            }
        )
    return rows


def _ranking(run: Run) -> list[dict[str, Any]]:
    """Return the cells that moved most, each with its enrichment against chance."""
    document = run.explanation or {}
    keys = ("layer", "degree", "element")

    def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in keys)

    enriched = {cell(row): row for row in document.get("enrichment", [])}
    return [
        {"enrichment": None, "q_value": None, **enriched.get(cell(row), {}), **row}
        for row in document.get("ranking", [])[:MOST_RANKED]
    ]


def _references(run: Run) -> list[dict[str, Any]]:
    base = run.results.get("reference_energies", {}).get("base", {})
    return [
        {"element": element, "base": base.get(element), "shift": shift}
        for element, shift in run.delta.shifts.items()
    ]


def _facts(run: Run) -> dict[str, Any]:
    """Return what the head of a page says about a run."""
    metadata, timing = run.delta.metadata, run.results.get("timing", {})
    preset = run.config.get("preset")
    return {
        "model": metadata.get("model"),
        "backend": metadata.get("backend"),
        "method": run.config["method"] + (f", preset {preset}" if preset else ""),
        "elements": metadata.get("elements", []),
        "n_train": metadata.get("data", {}).get("n_train"),
        "n_replay": metadata.get("data", {}).get("n_replay", 0),
        "fingerprint": metadata.get("data", {}).get("train", ""),
        "level_of_theory": run.config.get("level_of_theory"),
        "steps": run.results.get("steps"),
        "minutes": timing.get("seconds_total", 0) / 60,
        "updated": run.results["sparsity"]["updated_parameters"],
        "total": run.results["sparsity"]["total_parameters"],
        "percent": run.updated_percent,
        "licence": metadata.get("licence"),
    }


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pathtune.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "count": "{:,}".format,
        "setting": _setting,
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    folder = resources.files("pathtune.report") / "templates"
    environment.globals |= {
        "palette": PALETTE,
        "levels": _LEVELS,
        "style": (folder / "style.css").read_text(encoding="utf-8"),
        "script": (folder / "script.js").read_text(encoding="utf-8"),
    }
    return environment


def _number(value: float | None, digits: int = 3) -> str:
    """Return a number for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "−", 1) if value < 0 else text


def _setting(value: Any) -> str:
    """Return a setting for people."""
    if isinstance(value, Mapping):
        given = [f"{k} {_setting(v)}" for k, v in value.items() if v is not None]
        return ", ".join(given) or "–"
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "–"
    return "–" if value is None else str(value)


def _render(template: str, **content: Any) -> str:
    return _environment().get_template(template).render(**content)
