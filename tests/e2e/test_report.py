"""The report from the command line, of a real run of a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = pytest.mark.sevennet


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the finished run that may be changed."""
    return shutil.copytree(finished.folder, tmp_path / "run")


def test_a_finished_run_is_reported_on(cli, run):
    outcome = cli("report", run)
    assert outcome.code == 0, outcome.err
    text = (run / "report.html").read_text(encoding="utf-8")
    for figure in ("parity_forces", "training_layers", "updated_paths", "short_range"):
        assert f'id="{figure}"' in text
    assert "pathtune finetune --model" in text
    assert "valid" in text and "http" not in text
    sentence = outcome.out.splitlines()[0].split(": ", 1)[1]
    assert f"<span>{sentence}</span>" in text


def test_two_runs_and_their_figures(cli, run, tmp_path):
    page, figures = tmp_path / "both.html", tmp_path / "figures"
    line = ["report", run, run, "--output", page, "--figures", figures]
    outcome = cli(*line, "--format", "svg", "--json")
    assert outcome.code == 0, outcome.err
    printed = json.loads(outcome.out)
    assert printed["report"] == str(page) and page.exists()
    assert {p.name for p in figures.iterdir()} == {"learning.svg", "trade_off.svg"}
    assert [v["run"] for v in printed["verdicts"]] == [str(run)] * 2
    assert {v["level"] for v in printed["verdicts"]} <= {"good", "caution", "bad"}
    before = page.read_bytes()
    again = cli(*line)
    assert again.code == 2 and "--overwrite" in again.error
    assert page.read_bytes() == before


def test_a_folder_without_a_run_is_a_usage_error(cli, tmp_path):
    outcome = cli("report", tmp_path)
    assert outcome.code == 2
    assert "holds no finished run" in outcome.error
