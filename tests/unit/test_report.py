"""The report: what it says, what it shows, and what it does without."""

from __future__ import annotations

import json
import re
import types
from collections import Counter
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from pathtune import discovery, metrics, report, structures
from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import GPA
from pathtune.report import drawing, groups, outliers, page, verdict
from pathtune.report.run import QUANTITIES, Run, mae
from tests import run_folders
from tests.conftest import ROOT


@pytest.fixture
def no_figures(monkeypatch):
    """Leave the figures away, which take most of the time of a page."""
    monkeypatch.setattr(page, "drawings", lambda run: {})


def text_of(folder) -> str:
    """Write the report of a run; return it."""
    return report.write([folder]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def magnetic(tmp_path_factory):
    """Return a run folder with every property and three configuration types."""
    folder = tmp_path_factory.mktemp("magnetic") / "run"
    kinds = ("bulk", "surface", "slab")
    frames = run_folders.labelled(12, magmoms=True, config_types=kinds)
    return run_folders.make(folder, frames=frames)


@pytest.fixture(scope="module")
def magnetic_page(magnetic):
    """Return the page of `magnetic`."""
    return report.write([magnetic]).read_text(encoding="utf-8")


# The verdict


def answers(folder, **options):
    """Return the verdict of a made-up run, and its answers by their question."""
    judged = report.judge(Run(run_folders.make(folder, **options)))
    return judged, dict(
        zip(("better", "amount", "forgotten", "safe"), judged.answers, strict=True)
    )


DIMERS = {"n_pairs": 3, "base_hole_fraction": 0.0, "hole_fraction": 1 / 3}
HOLE = {"dimers": {**DIMERS, "new_holes": ["Ni-O"]}}
OLD_HOLE = {"dimers": {**DIMERS, "base_hole_fraction": 1 / 3, "new_holes": []}}
EXPLODED = {
    "nve": {
        "n_atoms": 8,
        "n_steps": 17,
        "time_step_fs": 1.0,
        "exploded": True,
        "energy_drift_mev_per_atom_per_ps": None,
    }
}
DRIFT = "forces_drift_mev_per_angstrom"


@pytest.mark.parametrize(
    ("options", "level", "question", "its_level", "words"),
    [
        ({}, "good", "safe", "good", "No sign"),
        ({"error": 0.9}, "bad", "better", "bad", "No."),
        ({"retention": HOLE}, "bad", "safe", "bad", "Ni-O"),
        ({"retention": EXPLODED}, "bad", "safe", "bad", "step 17"),
        ({"retention": OLD_HOLE}, "caution", "safe", "caution", "own holes"),
        ({"retention": {"nve": None}}, "caution", "safe", "caution", "no frame"),
        ({"retention": {"none": True}}, "caution", "safe", "unknown", "Not measured"),
        ({"retention": {DRIFT: 50.0}}, "good", "forgotten", "caution", "20 %"),
        ({"retention": {DRIFT: 100.0}}, "caution", "forgotten", "bad", "Much"),
    ],
)
def test_the_verdict(tmp_path, options, level, question, its_level, words):
    judged, found = answers(tmp_path / "run", **options)
    assert judged.level == level
    assert found[question].level == its_level
    assert words in found[question].answer
    assert all(answer.reasons for answer in judged.answers)


def test_a_loss_beside_a_gain_is_a_reservation(tmp_path):
    folder = run_folders.make(tmp_path / "run")
    results = json.loads((folder / "metrics.json").read_text())
    key = "energy_mae_mev_per_atom"
    results["test"][key] = 2 * results["zero_shot"][key]
    (folder / "metrics.json").write_text(json.dumps(results))
    judged = report.judge(Run(folder))
    assert judged.level == "caution"
    assert judged.sentence == "Better in part: Forces and Stress yes, Energy no."


def test_a_group_that_got_worse_is_named(tmp_path):
    frames = run_folders.labelled(30, config_types=[*9 * ["bulk"], "surface"])
    folder = run_folders.make(tmp_path / "run", frames=frames)
    predicted = run_folders.predictions(frames, 0.1, 2)
    for s, prediction in zip(frames, predicted, strict=True):
        if s.config_type == "surface":
            prediction["forces"] += 2.0
    path = folder / "predictions" / "test.xyz"
    structures.write_predictions(path, frames, predicted)
    judged = report.judge(Run(folder))
    assert judged.sentence == "Better in part: not for surface."
    assert judged.level == "caution"
    assert any("surface (Forces" in r for r in judged.answers[0].reasons)


def test_a_small_gain_is_none(tmp_path):
    folder = run_folders.make(tmp_path / "run")
    results = json.loads((folder / "metrics.json").read_text())
    results["test"] = {k: 0.9 * v for k, v in results["zero_shot"].items()}
    (folder / "metrics.json").write_text(json.dumps(results))
    assert report.judge(Run(folder)).level == "bad"


def test_frames_without_labels_leave_the_question_open(tmp_path, no_figures):
    folder = run_folders.make(tmp_path / "run", is_streamed=True)
    results = json.loads((folder / "metrics.json").read_text())
    results["test"] = {"n_structures": 12}
    (folder / "metrics.json").write_text(json.dumps(results))
    judged = report.judge(Run(folder))
    assert (judged.level, judged.answers[0].level) == ("caution", "unknown")
    assert "No label" in text_of(folder)


def test_reasons_name_the_numbers_and_the_bounds(tmp_path):
    _, found = answers(tmp_path / "run", has_test=False)
    reasons = " ".join(found["better"].reasons)
    assert "12 valid frames" in reasons and f"{verdict.BETTER:g}" in reasons
    assert "chose the step" in reasons
    assert "rough estimate" in reasons
    assert "last step was the best" in reasons
    assert "250" in found["forgotten"].reasons[0]
    run = Run(tmp_path / "run")
    ratio = mae(run.before, "forces") / mae(run.after, "forces")
    assert f"Forces {ratio:.1f}×" in found["amount"].answer


# Values


def test_values_have_the_errors_of_the_results(magnetic):
    run = Run(magnetic)
    assert run.properties == list(QUANTITIES)
    for name in run.properties:
        values = run.values(name)
        for errors, of in (
            (values.error, run.after),
            (values.error_before, run.before),
        ):
            # Extended XYZ rounds forces and moments to eight decimals.
            assert np.abs(errors).mean() == pytest.approx(mae(of, name), rel=1e-5)
    assert mae({"stress_mae_mev_per_angstrom3": 1e3 * GPA}, "stress") == 1.0
    moments = run.values("magmoms")
    nickel = [
        (run.frames[f][0].symbols[a])
        for f, a in zip(moments.frame, moments.atom, strict=True)
    ]
    assert set(nickel) == {"Ni"}


def test_errors_by_group_against_a_loop():
    generator = np.random.default_rng(0)
    names = generator.choice(["b", "a", "c"], 50)
    before, after = generator.normal(size=(2, 50))
    found = groups.errors(names, before, after)
    assert list(found) == ["a", "b", "c"]
    for name, (n, first, second) in found.items():
        rows = [i for i in range(50) if names[i] == name]
        assert n == len(rows)
        assert first == pytest.approx(sum(abs(before[i]) for i in rows) / n)
        assert second == pytest.approx(sum(abs(after[i]) for i in rows) / n)


def test_a_bad_frame_is_the_first_outlier(tmp_path):
    frames = run_folders.labelled(20)
    frames[7].labels["forces"][3] += 9.0
    folder = run_folders.make(tmp_path / "run", frames=frames)
    frames[7].labels["forces"][3] -= 18.0
    predicted = run_folders.predictions(frames, 0.1, 2)
    frames[7].labels["forces"][3] += 18.0
    path = folder / "predictions" / "test.xyz"
    structures.write_predictions(path, frames, predicted)
    first, second, *_ = outliers.listing(Run(folder))
    assert (first.frame, first.worst) == (7, f"3 ({frames[7].atoms.symbols[3]})")
    assert first.is_flagged and not second.is_flagged
    expected = predicted[7]["forces"] - frames[7].labels["forces"]
    assert first.rmse == pytest.approx(1e3 * (expected**2).mean() ** 0.5, rel=1e-5)


# What is missing


@pytest.mark.parametrize(
    ("options", "absent", "words"),
    [
        ({"has_test": False}, [], "12 valid frames"),
        (
            {"frames": run_folders.labelled(5, stress=False)},
            ["parity_stress", "error_by_config_type", "parity_magmoms"],
            "5 test frames",
        ),
        (
            {"evaluations": 1},
            ["training_curves", "training_layers"],
            "12 test frames",
        ),
        (
            {"retention": {"none": True}},
            ["retention", "short_range"],
            "<code>retention: none</code>",
        ),
        (
            {"is_streamed": True},
            ["parity_energy", "error_by_frame"],
            "No predictions are kept",
        ),
        ({"has_explanation": False}, ["updated_paths"], "pathtune explain run"),
        ({"replay": 20}, [], "replay"),
        (
            {"frames": run_folders.labelled(1)},
            ["error_by_config_type"],
            "1 test frames",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_what_a_run_lacks_is_left_out(tmp_path, monkeypatch, options, absent, words):
    folder = run_folders.make(tmp_path / "run", **options)
    with drawing.style():
        drawn = page.drawings(Run(folder))
    assert drawn and not drawn.keys() & set(absent)
    monkeypatch.setattr(page, "drawings", lambda run: {})
    assert words in text_of(folder)


def test_a_folder_of_an_earlier_version_is_reported_on(tmp_path, no_figures):
    folder = run_folders.make(tmp_path / "run", is_streamed=True)
    results = json.loads((folder / "metrics.json").read_text())
    for key in ("data", "reference_energies", "timing"):
        del results[key]
    (folder / "metrics.json").write_text(json.dumps(results))
    for name in ("environment.json", "short_range.json", "metrics.jsonl"):
        (folder / name).unlink()
    assert "started from Python" in text_of(folder)


# The page


class Tags(HTMLParser):
    """Collects attributes by tag."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_from_outside(magnetic_page):
    assert not re.search(r"https?:|@import|<script [^>]*src|srcset", magnetic_page)
    for tag, attributes in Tags(magnetic_page).found:
        for key in ("src", "href"):
            value = attributes.get(key, "#")
            assert value.startswith(("#", "data:,")), (tag, value)
    for target in re.findall(r"url\(([^)]*)\)", magnetic_page):
        assert target.startswith("#")


def test_every_identifier_is_unique_and_every_reference_resolves(magnetic_page):
    tags = Tags(magnetic_page).found
    counts = Counter(a["id"] for _, a in tags if "id" in a)
    assert max(counts.values()) == 1
    referred = set(re.findall(r"url\(#([^)]+)\)", magnetic_page))
    referred |= {a["href"][1:] for _, a in tags if a.get("href", "").startswith("#")}
    assert referred and referred <= counts.keys()


def test_figures_take_the_colours_of_the_page(magnetic_page):
    for svg in re.findall(r"<svg.*?</svg>", magnetic_page, re.DOTALL):
        assert "var(--ink)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_the_page_says_what_has_to_be_said(magnetic_page):
    for words in (
        "Better, and safe to use",
        "pathtune finetune --model 7net-0 --train train.xyz",
        "+0.2500",
        "Channels are no orbitals.",
        "level_of_theory",
        "prefers-color-scheme: dark",
    ):
        assert words in magnetic_page


NASTY = "</script><script>alert('ü')</script> & \"quoted\" 'ß' µ🧪"


def test_names_are_escaped(tmp_path):
    frames = run_folders.labelled(6, stress=False)
    frames[:2] = run_folders.with_names(frames[:2], NASTY)
    folder = run_folders.make(
        tmp_path / "<i>run & co",
        frames=frames,
        command=f"pathtune finetune --train '{NASTY}'",
        level_of_theory=NASTY,
        test="<u>&.xyz",
    )
    text = text_of(folder)
    assert "alert('" not in text
    assert not {"i", "u"} & {tag for tag, _ in Tags(text).found}
    # One script for the page; the others hold the values of its figures.
    scripts = [a for tag, a in Tags(text).found if tag == "script"]
    assert [a for a in scripts if a.get("type") != "application/json"] == [{}]
    for block in re.findall(r'<script type="application/json">(.*?)</script>', text):
        json.loads(block)


def test_names_in_any_script_are_drawn(tmp_path):
    frames = run_folders.labelled(6)
    frames[:2] = run_folders.with_names(frames[:2], "表面 $x$ 🧪")
    run = Run(run_folders.make(tmp_path / "run", frames=frames))
    figure = discovery.load("report.figures", "error_by_config_type")
    with drawing.style():
        assert "表面 $x$ 🧪" in drawing.inline_svg(figure.draw(run), "x")


def test_large_data_are_thinned_out_and_keep_their_outliers(tmp_path):
    frames = run_folders.labelled(150, repeat=2)
    predicted = run_folders.predictions(frames, 0.1, 2)
    predicted[123]["forces"][5, 1] += 30.0
    folder = run_folders.make(tmp_path / "run", frames=frames, evaluations=300)
    path = folder / "predictions" / "test.xyz"
    structures.write_predictions(path, frames, predicted)
    assert len(Run(folder).values("forces")) == 150 * 16 * 3
    written = report.write([folder])
    assert written.stat().st_size < 1e6
    text = written.read_text(encoding="utf-8")
    assert "hexagons count the values" in text
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text)
    parity = next(b for b in blocks if "values here" in b and "meV/Å" in b)
    assert "frame 123, atom 5" in parity


def test_several_runs_stand_side_by_side(tmp_path):
    one = run_folders.make(tmp_path / "first", seed=0)
    two = run_folders.make(tmp_path / "second", seed=1, retention={"none": True})
    text = report.write([one, two], tmp_path / "both.html").read_text("utf-8")
    assert re.search(r"<td>seed</td>\s*<td[^>]*>0</td>\s*<td[^>]*>1</td>", text)
    for name in ("learning", "trade_off", "run0-updated_paths", "run1-parity_forces"):
        assert f'id="{name}"' in text


def test_many_runs_are_compared_without_their_own_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "comparisons", lambda runs: {})
    folder = run_folders.make(tmp_path / "run")
    written = report.write([folder] * 5, tmp_path / "many.html")
    assert "left out of a page of more than 4" in written.read_text(encoding="utf-8")


# Figures as files


@pytest.mark.parametrize("kind", drawing.FORMATS)
def test_equal_runs_give_equal_files(magnetic, tmp_path, monkeypatch, kind):
    drawn = ("parity_energy", "retention")
    names = [n for n in discovery.names("report.figures") if n in drawn]
    monkeypatch.setattr(discovery, "names", lambda kind: names)
    first = report.write_figures([magnetic], tmp_path / "a", kind)
    assert {p.stem for p in first} == set(drawn)
    magic = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[kind]
    again = report.write_figures([magnetic], tmp_path / "b", kind)
    for a, b in zip(first, again, strict=True):
        assert a.read_bytes().startswith(magic)
        assert a.read_bytes() == b.read_bytes()


def test_figures_of_several_runs_compare_them(magnetic, tmp_path):
    written = report.write_figures([magnetic, magnetic], tmp_path / "both", "svg")
    assert {p.stem for p in written} == {"learning", "trade_off"}


@pytest.mark.parametrize("name", discovery.names("report.figures"))
def test_every_figure_keeps_the_contract(magnetic, name):
    module = discovery.load("report.figures", name)
    assert module.SECTION in page.SECTIONS
    with drawing.style():
        drawn = module.draw(Run(magnetic))
    assert drawn.title and drawn.caption.endswith(".")
    assert sum(len(p.texts) for p in drawn.points) > 1
    for points in drawn.points:
        assert len(points.x) == len(points.y) == len(points.texts)


def test_readings_lie_where_they_are_drawn(magnetic):
    with drawing.style():
        figure, (axes,) = drawing.canvas(width=4, height=2)
        axes.set(xlim=(0, 10), ylim=(0, 10))
        drawn = drawing.Drawing(
            "t", "c", figure, [drawing.Points(axes, [0, 10, 99], [0, 10, 5], "abc")]
        )
        drawing.inline_svg(drawn, "x")
    (x0, y0, first), (x1, y1, second) = drawing.readings(drawn)
    corners = axes.get_position()
    assert (first, second) == ("a", "b")
    assert (x0, x1) == pytest.approx((288 * corners.x0, 288 * corners.x1), abs=0.06)
    assert (y0, y1) == pytest.approx(
        (144 * (1 - corners.y0), 144 * (1 - corners.y1)), abs=0.06
    )


def test_drawing_leaves_the_settings_of_matplotlib_alone(magnetic, tmp_path):
    before = dict(matplotlib.rcParams)
    report.write_figures([magnetic, magnetic], tmp_path, "svg")
    assert dict(matplotlib.rcParams) == before


# Errors


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"config\.yaml is missing"):
        report.write([tmp_path])


def test_a_damaged_file_is_named(tmp_path):
    folder = run_folders.make(tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(PathtuneError, match=r"metrics\.json is damaged"):
        report.write([folder])


def test_an_unknown_format_is_told_the_nearest(tmp_path):
    folder = run_folders.make(tmp_path / "run")
    with pytest.raises(UsageError, match="Did you mean 'png'"):
        report.write_figures([folder], tmp_path, "pngg")


def test_several_runs_need_an_output(tmp_path):
    folder = run_folders.make(tmp_path / "run")
    with pytest.raises(UsageError, match="--output"):
        report.write([folder, folder])


def test_metrics_and_report_name_errors_alike():
    frames = run_folders.labelled(2, magmoms=True)
    named = metrics.errors(frames, run_folders.predictions(frames, 0.1, 0))
    assert {q.error for q in QUANTITIES.values()} <= named.keys()


def test_moments_that_are_the_input_are_no_verdict(tmp_path):
    frames = run_folders.labelled(12, magmoms=True)
    folder = run_folders.make(tmp_path / "run", frames=frames)
    titles = {
        spins: verdict.ratios(_with_spins(folder, spins)).keys()
        for spins in ("directions", "moments")
    }
    assert titles["directions"] - titles["moments"] == {"Moments"}
    assert not titles["moments"] - titles["directions"]


def _with_spins(folder, spins):
    path = folder / "metrics.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(results | {"spin": {"spins": spins}}), encoding="utf-8")
    return Run(folder)


def test_the_figure_of_the_docs_can_be_drawn(magnetic):
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    module = types.ModuleType("loss_by_epoch")
    exec(compile(block, "docs/report.md", "exec"), module.__dict__)
    assert module.SECTION in page.SECTIONS
    with drawing.style():
        drawn = module.draw(Run(magnetic))
        assert "loss" in drawing.inline_svg(drawn, "loss")
    assert len(drawing.readings(drawn)) == 8


@pytest.mark.parametrize("name", ["ethanol", "germanium"])
def test_the_examples_are_small_and_need_no_network(name):
    file = ROOT / "docs" / "examples" / f"{name}.html"
    assert file.stat().st_size < 600e3
    assert "http" not in file.read_text(encoding="utf-8")
    assert (ROOT / "docs" / "images" / f"report_{name}.png").stat().st_size < 200e3
