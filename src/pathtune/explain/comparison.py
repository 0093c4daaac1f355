"""Several changes of one base side by side: seeds, controls, other methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from pathtune import files
from pathtune.errors import PathtuneError
from pathtune.explain.account import Explanation, to_csv
from pathtune.explain.cells import layer_of
from pathtune.explain.enrichment import CELL, combined
from pathtune.explain.stability import jaccard, overlaps, stability
from pathtune.explain.tables import order

_SHOWN = ("updated", "density", "norm", "one_minus_r2", "share")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several explained changes.

    Parameters
    ----------
    explanations
        The changes.
    document
        Plain JSON types. ``runs``: name, method and seed of each. ``groups``: runs
        that differ in the seed alone, with ``stability``
        (`pathtune.explain.stability.stability`) and ``enrichment`` and ``orbitals``
        over the seeds: means, and p-values combined by Fisher's method with their
        q-values. ``pairs``: for any two runs the Jaccard index with its chance level,
        and the rank correlation of the cells' shares. ``cells``: for each cell the
        counts of every run, side by side.
    """

    explanations: Sequence[Explanation]
    document: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``comparison.json``, ``cells.csv``, ``pairs.csv`` and the groups'."""
        folder = Path(folder)
        flat = []
        for row in self.document["cells"]:
            columns = {key: row[key] for key in CELL}
            for run, counts in zip(self.document["runs"], row["runs"], strict=True):
                columns |= {f"{run['name']}:{k}": v for k, v in counts.items()}
            flat.append(columns)
        written = {"cells": flat, "pairs": self.document["pairs"]}
        for number, group in enumerate(self.document["groups"]):
            written[f"stability-{number}"] = group["stability"]["parameter"]
            written[f"enrichment-{number}"] = group["enrichment"]
            written[f"orbitals-{number}"] = group["orbitals"]
        for name, table in written.items():
            if table:
                files.write_text(folder / f"{name}.csv", to_csv(table))
        files.write_json(folder / "comparison.json", self.document)


def compare(explanations: Sequence[Explanation]) -> Comparison:
    """Set changes of one base side by side.

    Parameters
    ----------
    explanations
        At least two; names should differ.

    Raises
    ------
    PathtuneError
        If they are of different bases.
    """
    first = explanations[0]
    for other in explanations[1:]:
        if other.delta.metadata["base"] != first.delta.metadata["base"]:
            raise PathtuneError(
                f"{first.name} and {other.name} were made from different bases "
                f"({first.delta.metadata.get('model')}, "
                f"{other.delta.metadata.get('model')}); compare runs of one base"
            )
    groups: dict[str, list[int]] = {}
    for index, explanation in enumerate(explanations):
        groups.setdefault(_all_but_the_seed(explanation), []).append(index)
    document = {
        "runs": [{"name": e.name, **e.document["about"]} for e in explanations],
        "groups": [
            _group([explanations[i] for i in members])
            for members in groups.values()
            if len(members) > 1
        ],
        "pairs": [
            _pair(explanations[i], explanations[j])
            for j in range(len(explanations))
            for i in range(j)
        ],
        "cells": _side_by_side(explanations),
    }
    return Comparison(explanations, document)


def _all_but_the_seed(explanation: Explanation) -> str:
    metadata = explanation.delta.metadata
    if "method" not in metadata:
        return explanation.name
    same = {key: metadata.get(key) for key in ("method", "select", "data", "head")}
    return json.dumps(same, sort_keys=True)


def _group(members: Sequence[Explanation]) -> dict[str, Any]:
    layers = {r.name: layer_of(r) for r in members[0].records}
    method = members[0].delta.metadata.get("method", {}).get("name")
    return {
        "runs": [m.name for m in members],
        "method": method,
        "stability": stability([(m.delta.changes, m.alive) for m in members], layers),
        "enrichment": over_seeds([m.document["enrichment"] for m in members], CELL),
        "orbitals": over_seeds(
            [m.document["orbitals"] for m in members], ("element", "degree")
        ),
    }


def over_seeds(
    tables: Sequence[Sequence[Mapping[str, Any]]], by: Sequence[str]
) -> list[dict[str, Any]]:
    """Return enrichment tables of several seeds as one.

    Parameters
    ----------
    tables
        Of `pathtune.explain.enrichment.enrichment`, one for each seed.
    by
        Their keys.

    Returns
    -------
    list of dict
        For each group that all seeds have: mean ``enrichment`` and
        ``energy_enrichment``; ``p_value`` and ``energy_p_value`` combined by Fisher's
        method; ``q_value`` and ``energy_q_value`` over the groups.
    """
    indexed = [
        {tuple(r[b] for b in by): r for r in table if "p_value" in r}
        for table in tables
    ]
    shared = [key for key in indexed[0] if all(key in other for other in indexed)]
    result: list[dict[str, Any]] = []
    for key in shared:
        seeds = [table[key] for table in indexed]
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        for prefix in ("", "energy_"):
            column = [s[f"{prefix}enrichment"] for s in seeds]
            row[f"{prefix}enrichment"] = sum(column) / len(column)
            row[f"{prefix}p_value"] = combined([s[f"{prefix}p_value"] for s in seeds])
        result.append(row)
    for prefix in ("", "energy_") if result else ():
        q = stats.false_discovery_control([r[f"{prefix}p_value"] for r in result])
        for row, value in zip(result, q, strict=True):
            row[f"{prefix}q_value"] = float(value)
    return sorted(result, key=order)


def _pair(first: Explanation, second: Explanation) -> dict[str, Any]:
    found = overlaps(
        (first.delta.changes, first.alive), (second.delta.changes, second.alive)
    )
    shares = [
        {tuple(r[k] for k in CELL): r["share"] for r in e.document["tables"]["cell"]}
        for e in (first, second)
    ]
    keys = sorted({*shares[0], *shares[1]}, key=str)
    columns = [[table.get(key, 0.0) for key in keys] for table in shares]
    varies = all(len(set(column)) > 1 for column in columns)
    return {
        "first": first.name,
        "second": second.name,
        **jaccard(found.values()),
        "rank_correlation": float(stats.spearmanr(*columns).statistic)
        if varies
        else None,
    }


def _side_by_side(explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
    indexed = [
        {tuple(r[k] for k in CELL): r for r in e.document["tables"]["cell"]}
        for e in explanations
    ]
    keys = dict.fromkeys(key for table in indexed for key in table)
    cells = [
        {
            **dict(zip(CELL, key, strict=True)),
            "runs": [
                {k: t[key][k] if key in t else None for k in _SHOWN} for t in indexed
            ],
        }
        for key in keys
    ]
    return sorted(cells, key=order)
