"""Explanations as tables for a terminal: title, columns, rows of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Table = tuple[str, list[str], list[list[str]]]
Row = Mapping[str, Any]

#: Tables shown one after another; the others are in the files.
SHOWN = ("layer", "kind", "degree", "element", "radial")
_COUNTS = ("alive", "updated", "density", "relative_norm", "one_minus_r2", "share")
_HEADS = {
    "alive": "trainable",
    "density": "updated %",
    "relative_norm": "|dW|/|W|",
    "one_minus_r2": "1 - R²",
    "share": "of |dW|² %",
}


def explanation(document: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of an explanation's document."""
    found = document["tables"]
    for name in SHOWN:
        keys = ["layer", "basis"] if name == "radial" else [name]
        rows = [r for r in found[name] if name != "radial" or r["updated"]]
        if rows:
            yield f"by {name}", *_counts(rows, keys)
    cell = ["layer", "degree", "element"]
    if ranking := document["ranking"]:
        yield "what moved most", *_counts(ranking[:10], cell)
    significant = [r for r in document["enrichment"] if _least_q(r) < 0.05]
    if significant:
        yield (
            "more of the change than a uniform placement gives (false discoveries "
            "below 5 %)",
            *_enriched(significant, cell),
        )
    channels = [r for r in document["orbitals"] if "p_value" in r]
    if channels:
        yield (
            "by element and channel (l = 0, 1, 2, ...)",
            *_enriched(channels, ["element", "channel"]),
        )
    if document["ablation"]:
        yield ablation(document["ablation"])


def ablation(content: Mapping[str, Any]) -> Table:
    """Return the table of an ablation: errors with one part undone."""
    rows = content["rows"]
    errors = [key for key in rows[0] if "_mae_" in key]
    body = [
        [
            " ".join(
                _text(r[key]) for key in ("undone", "value") if r[key] is not None
            ),
            str(r["updated"]),
            *(f"{r[key]:.2f}" for key in errors),
        ]
        for r in rows
    ]
    title = f"undone, on {content['n_structures']} frames of {content['data']}"
    return title, ["undone", "entries", *errors], body


def comparison(document: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of a comparison's document."""
    columns = ["first", "second", "Jaccard", "by chance", "corrected", "rank corr."]
    keys = ("jaccard", "chance", "corrected", "rank_correlation")
    yield (
        "overlap of the changed entries",
        columns,
        [
            [r["first"], r["second"], *(_number(r[k]) for k in keys)]
            for r in document["pairs"]
        ],
    )
    for group in document["groups"]:
        stable = group["stability"]
        names = ", ".join(group["runs"])
        rows = [
            [label, *(_number(row[k]) for k in keys[:3])]
            for label, row in [
                *((row["layer"], row) for row in stable["layer"]),
                ("all", stable),
            ]
        ]
        columns = ["layer", "Jaccard", "by chance", "corrected"]
        yield f"stability over seeds: {names}", columns, rows
        significant = [r for r in group["enrichment"] if _least_q(r) < 0.05]
        if significant:
            yield (
                f"enriched over all seeds: {names}",
                *_enriched(significant, ["layer", "degree", "element"]),
            )
    runs = [run["name"] for run in document["runs"]]
    yield (
        "updated % | share of |dW|² %, cell by cell",
        ["layer", "degree", "element", *runs],
        [
            [
                *(_text(row[k]) for k in ("layer", "degree", "element")),
                *(
                    f"{_percent(run['density'])} | {_percent(run['share'])}"
                    for run in row["runs"]
                ),
            ]
            for row in document["cells"]
        ],
    )


def _counts(rows: Sequence[Row], keys: list[str]) -> tuple[list[str], list[list[str]]]:
    columns = [*keys, *(_HEADS.get(name, name) for name in _COUNTS)]
    return columns, [
        [
            *(_text(row[key]) for key in keys),
            str(row["alive"]),
            str(row["updated"]),
            _percent(row["density"]),
            _number(row["relative_norm"]),
            _number(row["one_minus_r2"]),
            _percent(row["share"]),
        ]
        for row in rows
    ]


def _enriched(
    rows: Sequence[Row], keys: list[str]
) -> tuple[list[str], list[list[str]]]:
    columns = [*keys, "entries, times", "q", "|dW|², times", "q"]
    return columns, [
        [
            *(_text(row[key]) for key in keys),
            f"{row['enrichment']:.2f}",
            _number(row["q_value"]),
            f"{row['energy_enrichment']:.2f}",
            _number(row["energy_q_value"]),
        ]
        for row in rows
    ]


def _least_q(row: Row) -> float:
    return float(min(row["q_value"], row["energy_q_value"]))


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
