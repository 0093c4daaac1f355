"""What a change is made of: tables, enrichment, stability, all against plain twins."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from pathtune.deltafile import Change, DeltaFile, exact_change, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.explain import compare, explain, explain_run
from pathtune.explain.ablation import without
from pathtune.explain.account import to_csv, trainable
from pathtune.explain.cells import KEYS, Cells, measure, rows
from pathtune.explain.comparison import over_seeds
from pathtune.explain.enrichment import (
    combined,
    enrichment,
    moments_p,
    permutation_p,
)
from pathtune.explain.show import comparison as shown_comparison
from pathtune.explain.show import explanation as shown
from pathtune.explain.stability import Overlap, jaccard, overlaps, stability
from pathtune.explain.tables import TABLES, tables
from tests.conftest import ROOT
from tests.reference import explanation as twin
from tests.reference import path_weights

RECORDS = [
    replace(w, basis_axis=0) if w.name in ("radial", "bessel") else w
    for w in path_weights.small()
]
BASE = path_weights.values(RECORDS)


def drawn(seed=0, share=0.4, scale=0.1, names=None):
    """Return random changes of the small model, in float64."""
    generator = np.random.default_rng(seed)
    changes = {}
    for record in RECORDS:
        if names is None or record.name in names:
            hit = torch.from_numpy(generator.random(record.shape) < share)
            noise = torch.from_numpy(generator.normal(0, scale, record.shape))
            changes[record.name] = exact_change(
                BASE[record.name], BASE[record.name] + hit * noise
            )
    return changes


def everything():
    return {
        r.name: np.setdiff1d(np.arange(r.size), np.array(r.unused, dtype=int))
        for r in RECORDS
    }


@dataclass
class Loaded:
    """What an explanation asks of a backend."""

    records: list = field(default_factory=lambda: RECORDS)
    weights: dict = field(default_factory=lambda: BASE)
    head: str | None = None

    def path_weights(self):
        return self.records

    def stored_weights(self):
        return self.weights


def a_delta(seed=0, **metadata):
    made = {
        "base": fingerprint(BASE),
        "backend": "toy",
        "model": "toy.pth",
        "method": {"name": "sparse", "config": {}},
        "select": "everything",
        "seed": seed,
        "elements": ["H", "O"],
    }
    return DeltaFile(drawn(seed), {"H": 0.5}, made | metadata)


# Tables


@pytest.mark.parametrize("by", [*TABLES.values(), ("element", "degree")])
def test_every_row_is_what_its_entries_say(by):
    changes = drawn()
    alive = everything()
    del alive["bessel"]
    cells = measure(RECORDS, BASE, changes, alive)
    groups: dict = {}
    for record in RECORDS:
        change = changes[record.name].dense().tolist()
        weight = BASE[record.name].flatten().tolist()
        updated = set(changes[record.name].indices.tolist())
        trained = {*alive.get(record.name, []), *updated}
        starts = {p.start: p for p in record.paths}
        path = None
        for index, irrep, element in twin.places(record):
            path = starts.get(index, path)
            basis = None
            if record.basis_axis is not None:
                basis = index // int(np.prod(record.shape[1:]))
            layer = record.role if record.layer is None else str(record.layer)
            keys = {
                "parameter": record.name,
                "layer": layer,
                "kind": record.kind,
                "role": record.role,
                "irrep_in": path and path.irrep_in,
                "irrep_out": irrep,
                "degree": None if irrep is None else int(irrep[:-1]),
                "element": element,
                "basis": basis,
            }
            entry = (index in trained, index in updated, weight[index], change[index])
            groups.setdefault(tuple(keys[k] for k in by), []).append(entry)
    total = sum(d * d for entries in groups.values() for *_, d in entries)
    table = rows(cells, by)
    assert {tuple(r[k] for k in by) for r in table} == set(groups)
    for row in table:
        entries = groups[tuple(row[k] for k in by)]
        trained = [(w, d) for is_alive, _, w, d in entries if is_alive]
        changed = [d for _, hit, _, d in entries if hit]
        assert row["entries"] == len(entries)
        assert row["alive"] == len(trained)
        assert row["updated"] == len(changed)
        assert row["norm"] == pytest.approx(twin.norm(changed), rel=1e-12)
        if trained:
            assert row["density"] == pytest.approx(len(changed) / len(trained))
            size = twin.norm([w for w, _ in trained])
            assert row["relative_norm"] == pytest.approx(row["norm"] / size, rel=1e-12)
        assert row["share"] == pytest.approx(row["norm"] ** 2 / total, rel=1e-12)
        assert row["largest"] == max(map(abs, changed), default=0.0)
        if changed and len(trained) > 1:
            r2 = twin.one_minus_r2(*zip(*trained, strict=True))
            assert row["one_minus_r2"] == pytest.approx(r2, rel=1e-10)


def test_one_minus_r2_is_zero_where_untouched_and_none_where_all_weights_are_equal():
    base = {name: torch.full_like(w, 0.1) for name, w in BASE.items()}
    changes = {"linear": exact_change(base["linear"], base["linear"] + 1)}
    cells = measure(RECORDS, base, changes, everything())
    found = {r["parameter"]: r["one_minus_r2"] for r in rows(cells, ("parameter",))}
    assert found.pop("linear") is None
    assert set(found.values()) == {0.0}


def test_tables_leave_out_what_could_not_change():
    alive = {"fctp": np.arange(3)}
    found = tables(measure(RECORDS, BASE, {}, alive))
    assert [r["parameter"] for r in found["parameter"]] == ["fctp"]
    assert found["radial"] == []


def test_layers_degrees_and_elements_are_in_order():
    found = tables(measure(RECORDS, BASE, drawn(), everything()))
    assert [r["layer"] for r in found["layer"]] == ["embedding", "0"]
    assert [r["degree"] for r in found["degree"]] == [None, 0, 1]
    assert [r["element"] for r in found["element"]] == [None, "H", "C", "O"]
    assert [r["basis"] for r in found["radial"]] == [0, 1, 2, 3, 4, 0, 1, 2]


def test_a_part_of_the_cells_keeps_its_entries():
    changes = drawn()
    cells = measure(RECORDS, BASE, changes, everything())
    part = cells.where(lambda key: key["parameter"] == "fctp")
    assert sum(part.updated) == len(part.squares) == len(changes["fctp"].indices)
    squares = (changes["fctp"].values ** 2).numpy()
    assert np.array_equal(part.squares, squares)
    assert np.array_equal(np.bincount(part.owner), part.updated)


# Enrichment


def uniform(seed, *, n_cells=15, size=400, density=0.05, planted=None, factor=1.0):
    """Return cells with a uniformly placed change, except in the planted cell.

    That one holds `factor` times as many entries, of twice the size. Values are
    heavy-tailed, as those of a trained change.
    """
    generator = np.random.default_rng(seed)
    sizes = generator.integers(size // 4, size, n_cells)
    owner = np.repeat(np.arange(n_cells), sizes)
    hit = generator.random(len(owner)) < density
    if planted is not None:
        chosen = owner == planted
        hit[chosen] = generator.random(int(chosen.sum())) < factor * density
    owner = owner[hit]
    squares = generator.laplace(size=len(owner)) ** 2
    squares[owner == planted] *= 4
    keys = [dict.fromkeys(KEYS) | {"layer": str(i)} for i in range(n_cells)]
    zero = np.zeros(n_cells)
    updated = np.bincount(owner, minlength=n_cells)
    square = np.bincount(owner, squares, minlength=n_cells)
    columns = [sizes, sizes, updated, zero, zero, square, zero]
    return Cells(keys, *columns, squares, owner)


def discoveries(seed, column, **options):
    cells = uniform(seed, **options)
    table = enrichment(cells, ("layer",), seed=seed)
    return {int(r["layer"]) for r in table if r[column] < 0.05}


@pytest.mark.parametrize("column", ["q_value", "energy_q_value"])
def test_noise_is_called_enriched_no_more_often_than_promised(column):
    """Without a plant every discovery is false: at most 5 % of the draws have any."""
    n_draws = 150
    false = sum(bool(discoveries(seed, column)) for seed in range(n_draws))
    # Three standard deviations of a binomial above the nominal rate.
    assert false <= n_draws * 0.05 + 3 * (n_draws * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("column", ["q_value", "energy_q_value"])
def test_a_planted_change_is_found(column):
    found = [discoveries(seed, column, planted=7, factor=5.0) for seed in range(40)]
    assert sum(7 in cells for cells in found) >= 36
    others = sum(len(cells - {7}) for cells in found)
    assert others <= 0.1 * sum(map(len, found))


def test_p_values_are_those_of_the_twin():
    cells = uniform(3, n_cells=6, size=40, density=0.3, planted=2, factor=2.0)
    table = enrichment(cells, ("layer",))
    n_alive, n_updated = sum(cells.alive), sum(cells.updated)
    expected = [
        twin.at_least(int(k), int(n_alive), int(n_updated), int(n))
        for k, n in zip(cells.updated, cells.alive, strict=True)
    ]
    assert [r["p_value"] for r in table] == pytest.approx(expected, rel=1e-9)
    for prefix in ("", "energy_"):
        q = twin.benjamini_hochberg([r[f"{prefix}p_value"] for r in table])
        assert [r[f"{prefix}q_value"] for r in table] == pytest.approx(q, rel=1e-12)
    for index, row in enumerate(table):
        uniform_share = cells.alive[index] / n_alive
        share = cells.updated[index] / n_updated
        assert row["enrichment"] == pytest.approx(share / uniform_share)
        energy = cells.squares[cells.owner == index].sum() / cells.squares.sum()
        assert row["energy_enrichment"] == pytest.approx(energy / uniform_share)


def test_the_permutation_test_is_one_of_all_placements():
    """Three values on five entries of two groups: all 60 placements, one by one."""
    from itertools import permutations

    squares, alive = np.array([1.0, 2.0, 4.0]), np.array([2, 3])
    owner = [0, 0, 1, 1, 1]
    observed = np.array([4.0, 3.0])
    hits, n = np.zeros(2), 0
    for placed in permutations(range(5), 3):
        sums = np.zeros(2)
        for value, place in zip(squares, placed, strict=True):
            sums[owner[place]] += value
        hits += sums >= observed
        n += 1
    p = permutation_p(observed, squares, alive, 20000, seed=0)
    assert p == pytest.approx(hits / n, abs=0.015)


def test_moments_stand_in_for_many_permutations():
    cells = uniform(5, n_cells=8, size=3000, density=0.2, planted=3, factor=1.1)
    observed = np.bincount(cells.owner, cells.squares, minlength=8)
    by_draws = permutation_p(observed, cells.squares, cells.alive, 1999, seed=0)
    by_moments = moments_p(observed, cells.squares, cells.alive)
    assert by_moments == pytest.approx(by_draws, abs=0.03)
    assert by_moments.min() < 0.05 < by_moments.max()


def test_a_change_of_everything_is_enriched_nowhere():
    cells = measure(RECORDS, BASE, drawn(share=2), everything())
    table = enrichment(cells)
    assert {r["enrichment"] for r in table} == {1.0}
    assert {r["p_value"] for r in table} == {1.0}
    (whole,) = enrichment(cells, ())
    assert whole["energy_p_value"] == 1


def test_nothing_changed_nothing_enriched():
    assert enrichment(measure(RECORDS, BASE, {}, everything())) == []


def test_equal_seeds_give_equal_p_values():
    cells = uniform(1)
    assert enrichment(cells, seed=4) == enrichment(cells, seed=4)
    assert enrichment(cells, seed=4) != enrichment(cells, seed=5)


def test_seeds_are_combined_by_fishers_method():
    p = [0.03, 0.2, 0.5]
    assert combined(p) == pytest.approx(twin.fisher(p), rel=1e-12)
    assert 0 <= combined([0.0, 0.5]) < 1e-300
    seeds = [enrichment(uniform(s, planted=7, factor=3), ("layer",)) for s in (1, 2, 3)]
    table = over_seeds(seeds, ("layer",))
    best = min(table, key=lambda r: r["p_value"])
    assert best["layer"] == "7"
    own = [next(r for r in t if r["layer"] == "7") for t in seeds]
    assert best["p_value"] == pytest.approx(combined([r["p_value"] for r in own]))
    assert best["enrichment"] == pytest.approx(np.mean([r["enrichment"] for r in own]))
    assert best["q_value"] >= best["p_value"]


# Stability


def placed(indices, size):
    chosen = torch.as_tensor(np.sort(indices), dtype=torch.int64)
    return Change(chosen, torch.ones(len(chosen)).double(), (size,))


def test_the_chance_level_of_the_jaccard_index_is_the_analytic_one():
    size = 4000
    for p1, p2 in ((0.05, 0.05), (0.3, 0.1)):
        found = jaccard([Overlap(size, int(p1 * size), int(p2 * size), 0)])
        expected = twin.chance_jaccard(p1, p2)
        assert found["chance"] == pytest.approx(expected, rel=1e-12)
        assert twin.chance_jaccard(p1, p1) == pytest.approx(p1 / (2 - p1))


def test_random_supports_are_as_stable_as_chance():
    """Layers of different density: chance keeps them, the excess is zero."""
    generator = np.random.default_rng(0)
    sizes = {"a": (3000, 0.02), "b": (1000, 0.5), "c": (500, 0.0)}
    alive = {name: np.arange(n) for name, (n, _) in sizes.items()}

    def random_run():
        return {
            name: placed(generator.choice(n, int(p * n), replace=False), n)
            for name, (n, p) in sizes.items()
        }, alive

    runs = [random_run() for _ in range(8)]
    found = stability(runs, {"a": "0", "b": "1", "c": "1"})
    assert found["jaccard"] == pytest.approx(found["chance"], abs=0.01)
    assert found["corrected"] == pytest.approx(0, abs=0.02)
    by_layer = {r["layer"]: r for r in found["layer"]}
    assert by_layer["0"]["chance"] == pytest.approx(
        twin.chance_jaccard(0.02, 0.02), rel=1e-9
    )
    assert by_layer["1"]["chance"] == pytest.approx(
        twin.chance_jaccard(0.5, 0.5), rel=1e-9
    )
    by_name = {r["parameter"]: r for r in found["parameter"]}
    assert by_name["c"]["jaccard"] is None


def test_equal_supports_are_perfectly_stable():
    changes, alive = {"a": placed([1, 5, 9], 50)}, {"a": np.arange(50)}
    found = stability([(changes, alive)] * 3, {"a": "0"})
    assert found["jaccard"] == found["corrected"] == 1
    assert found["n_runs"] == 3


def test_supports_of_everything_have_no_excess_over_chance():
    changes, alive = {"a": placed(range(20), 20)}, {"a": np.arange(20)}
    found = stability([(changes, alive)] * 2, {"a": "0"})
    assert (found["jaccard"], found["corrected"]) == (1, None)


def test_overlaps_are_counted_over_what_either_run_could_change():
    first = {"a": placed([0, 1, 2], 10)}, {"a": np.arange(6)}
    second = {"a": placed([2, 7], 10)}, {"a": np.arange(4, 8)}
    assert overlaps(first, second) == {"a": Overlap(8, 3, 2, 1)}


# Explanations


def test_an_explanation_is_plain_json_and_csv(tmp_path):
    made = explain(Loaded(), a_delta(), name="run")
    content = json.loads(json.dumps(made.document, allow_nan=False))
    made.write(tmp_path)
    assert json.loads((tmp_path / "explain.json").read_text()) == content
    assert content["about"]["shifts"] == {"H": 0.5}
    assert content["totals"]["updated"] == made.delta.updated_parameters
    for name, table in content["tables"].items():
        text = (tmp_path / f"{name}.csv").read_text()
        read = list(csv.DictReader(io.StringIO(text)))
        assert len(read) == len(table)
        for row, values in zip(read, table, strict=True):
            assert list(row) == list(values)
            for key, value in values.items():
                assert row[key] == ("" if value is None else str(value))
    assert not list(tmp_path.glob(".*"))
    assert sum(r["share"] for r in content["ranking"]) == pytest.approx(1)
    shares = [r["share"] for r in content["ranking"]]
    assert shares == sorted(shares, reverse=True)


def test_channels_are_read_by_element_with_their_caveat():
    made = explain(Loaded(), a_delta())
    found = {(r["element"], r["channel"]): r for r in made.document["orbitals"]}
    # Carbon was absent from the training, yet the drawn change touches it.
    assert set(found) == {(e, c) for e in ("H", "C", "O") for c in "sp"}
    assert all("energy_q_value" in row for row in found.values())
    assert "not for atomic orbitals" in made.document["remarks"][0]
    shared = [r for r in RECORDS if not r.elements]
    plain = Loaded(shared, {r.name: BASE[r.name] for r in shared})
    changes = {"linear": drawn()["linear"]}
    delta = replace(a_delta(base=fingerprint(plain.weights)), changes=changes)
    made = explain(plain, delta)
    assert made.document["orbitals"] == []
    assert made.document["remarks"] == []


def test_what_could_be_trained_follows_from_the_run():
    alive = trainable(RECORDS, a_delta(select="fctp"), None)
    (expected,) = [t for t in path_weights.targets() if t.weight.name == "fctp"]
    assert list(alive) == ["fctp"]
    assert np.array_equal(alive["fctp"], expected.indices)
    # Its low-rank products do not reach a bias or a single number.
    elora = a_delta(method={"name": "elora", "config": {}})
    assert set(trainable(RECORDS, elora, None)) < set(
        trainable(RECORDS, a_delta(), None)
    )


def test_what_could_be_trained_is_guessed_for_a_delta_that_is_no_runs():
    summed = a_delta().add(replace(a_delta(1), changes={}))
    changes = {"fctp": summed.changes["fctp"]}
    made = explain(Loaded(), replace(summed, changes=changes))
    assert {r["kind"] for r in made.document["tables"]["kind"]} == {"fctp"}
    assert any("not recorded" in remark for remark in made.document["remarks"])


def test_a_delta_of_another_base_is_refused():
    other = {name: w + 1 for name, w in BASE.items()}
    with pytest.raises(PathtuneError, match=r"made for 'toy\.pth'"):
        explain(Loaded(RECORDS, other), a_delta())


def test_a_frozen_run_is_explained():
    made = explain(Loaded(), replace(a_delta(), changes={}))
    assert made.document["totals"]["updated"] == 0
    assert made.document["ranking"] == made.document["enrichment"] == []
    assert list(shown(made.document))


def test_a_folder_without_a_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"config\.yaml is missing"):
        explain_run(tmp_path)


def test_a_delta_of_an_unknown_base_asks_for_it(tmp_path):
    a_delta().save(tmp_path / "delta.safetensors")
    with pytest.raises(UsageError, match="--model"):
        explain_run(tmp_path / "delta.safetensors")


def test_undoing_parts_adds_up_to_the_whole():
    delta = a_delta()
    made = explain(Loaded(), delta)
    layers = [k["layer"] for k in made.cells.keys]
    parts = [
        without(delta, made.cells, np.array([layer != kept for layer in layers]))
        for kept in dict.fromkeys(layers)
    ]
    whole = parts[0].add(parts[1])
    for name, change in delta.changes.items():
        assert torch.equal(whole.changes[name].dense(), change.dense())
    for part in parts:
        assert part.shifts == delta.shifts
    nothing = without(delta, made.cells, np.ones(len(layers), bool))
    assert nothing.changes == {}


def test_undoing_keeps_what_float64_rounds_off():
    base = {n: w * 1e-24 for n, w in BASE.items()}
    tuned = base["fctp"] + drawn()["fctp"].dense().view(base["fctp"].shape)
    change = exact_change(base["fctp"], tuned)
    assert change.remainder is not None
    delta = replace(a_delta(base=fingerprint(base)), changes={"fctp": change})
    made = explain(Loaded(RECORDS, base), delta)
    undone = np.array([k["degree"] == 1 for k in made.cells.keys])
    merged = without(delta, made.cells, undone).apply(base)["fctp"]
    # The first path is of degree 0 and stays as tuned, the second is the base again.
    assert torch.equal(merged[:24], tuned[:24])
    assert torch.equal(merged[24:], base["fctp"][24:])


# Several


def test_seeds_are_grouped_and_others_stand_beside_them(tmp_path):
    made = [explain(Loaded(), a_delta(seed), name=f"s{seed}") for seed in range(3)]
    control = a_delta(7, method={"name": "random_support", "config": {}})
    made.append(explain(Loaded(), control, name="control"))
    result = compare(made)
    content = json.loads(json.dumps(result.document, allow_nan=False))
    (group,) = content["groups"]
    assert group["runs"] == ["s0", "s1", "s2"]
    assert group["stability"]["n_runs"] == 3
    assert len(content["pairs"]) == 6
    pair = next(p for p in content["pairs"] if p["second"] == "control")
    assert pair["corrected"] == pytest.approx(0, abs=0.2)
    for row in content["cells"]:
        assert len(row["runs"]) == 4
        for run, explanation in zip(row["runs"], made, strict=True):
            table = explanation.document["tables"]["cell"]
            keys = ("layer", "degree", "element")
            own = [r for r in table if all(r[k] == row[k] for k in keys)]
            assert run["updated"] == (own[0]["updated"] if own else None)
    result.write(tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == content
    header = (tmp_path / "cells.csv").read_text().splitlines()[0]
    assert header.startswith("layer,degree,element,s0:updated,")
    titles = [title for title, *_ in shown_comparison(result.document)]
    assert titles[0].startswith("overlap")
    assert "stability over seeds: s0, s1, s2" in titles


def test_changes_of_different_bases_are_not_compared():
    other = {name: w + 1 for name, w in BASE.items()}
    made = [
        explain(Loaded(), a_delta(), name="a"),
        explain(Loaded(RECORDS, other), a_delta(base=fingerprint(other)), name="b"),
    ]
    with pytest.raises(PathtuneError, match="a and b were made from different bases"):
        compare(made)


def test_every_shown_row_has_as_many_fields_as_columns():
    made = explain(Loaded(), a_delta())
    content = {
        "data": "test.xyz",
        "n_structures": 2,
        "rows": [
            {"undone": "nothing", "value": None, "updated": 0, "energy_mae_x": 1.0},
            {"undone": "layer", "value": "0", "updated": 9, "energy_mae_x": 2.0},
        ],
    }
    for _, columns, body in shown({**made.document, "ablation": content}):
        assert body
        assert {len(row) for row in body} == {len(columns)}


def test_csv_keeps_columns_that_only_some_rows_have():
    assert to_csv([{"a": 1}, {"a": None, "b": "x,y"}]) == 'a,b\n1,\n,"x,y"\n'


# Size

LARGE = """
    import pathlib, time
    import numpy as np, torch
    from ase.data import chemical_symbols
    from pathtune.deltafile import Change
    from pathtune.explain.account import orbitals
    from pathtune.explain.cells import measure
    from pathtune.explain.enrichment import enrichment
    from pathtune.explain.tables import tables
    from pathtune.paths import Path, PathWeight

    records = []
    for layer in range(2):
        paths, start = [], 0
        for l in range(4):
            shape = (96, 89, 128)
            stop = start + 96 * 89 * 128
            paths.append(Path(start, stop, shape, "0e", f"{l}e", 1))
            start = stop
        records.append(PathWeight(f"skip{layer}", (start,), "fctp", "interaction",
                                  layer, tuple(paths), tuple(chemical_symbols[1:90])))
        size = 1100 * 1100
        path = Path(0, size, (1100, 1100), "1o", "1o")
        records.append(PathWeight(f"linear{layer}", (size,), "linear", "interaction",
                                  layer, (path,)))
    base, changes, alive, total = {}, {}, {}, 0
    for r in records:
        base[r.name] = torch.randn(r.shape)
        values = torch.randn(r.size, dtype=torch.float64)
        changes[r.name] = Change(torch.arange(r.size), values, r.shape)
        alive[r.name] = np.arange(r.size)
        total += r.size
    assert total > 1e7
    before = time.perf_counter()
    cells = measure(records, base, changes, alive)
    found = tables(cells)
    assert found["kind"][0]["updated"] + found["kind"][1]["updated"] == sum(
        len(c.indices) for c in changes.values())
    enrichment(cells)
    orbitals(cells)
    seconds = time.perf_counter() - before
    # Not getrusage: its peak includes what the parent had when it forked.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**10
    print(total, round(seconds, 2), round(peak))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_ten_million_parameters_take_seconds_and_less_than_a_gigabyte():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    _, seconds, mib = map(float, done.stdout.split())
    assert seconds < 30
    assert mib < 1000
