"""Explaining runs, delta files and checkpoints through the command line."""

from __future__ import annotations

import json

import ase.io
import pytest
import yaml

from pathtune import api
from pathtune.deltafile import DeltaFile
from tests.conftest import crystals
from tests.e2e.conftest import tree

pytestmark = pytest.mark.sevennet
ERRORS = (
    "energy_mae_mev_per_atom",
    "energy_rmse_mev_per_atom",
    "forces_mae_mev_per_angstrom",
    "forces_rmse_mev_per_angstrom",
)


@pytest.fixture
def explained(cli, trusted_tiny):
    """Run `explain --json`; return the document."""

    def run(*args):
        outcome = cli("explain", *args, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


def written(folder):
    return json.loads((folder / "explain" / "explain.json").read_text())


def test_a_run_explains_itself_and_the_command_says_the_same(finished, explained):
    before = written(finished.folder)
    again = explained(finished.folder)
    assert again == before == written(finished.folder)
    results = json.loads((finished.folder / "metrics.json").read_text())
    counts = results["sparsity"]
    assert before["totals"]["entries"] == counts["total_parameters"]
    assert before["totals"]["alive"] == counts["alive_parameters"]
    assert before["totals"]["updated"] == counts["updated_parameters"]
    names = {p.name for p in (finished.folder / "explain").iterdir()}
    assert {"explain.json", "layer.csv", "degree.csv", "orbitals.csv"} <= names
    elements = {r["element"] for r in before["tables"]["element"]}
    assert elements == {None, "H", "C", "O"}


def test_people_see_tables(cli, finished, trusted_tiny):
    outcome = cli("explain", finished.folder)
    assert outcome.code == 0, outcome.err
    for title in ("by layer", "by degree", "by element", "what moved most"):
        assert title in outcome.out
    assert "not for atomic orbitals" in " ".join(outcome.out.split())


def test_a_delta_file_is_explained_and_written_where_asked(
    finished, explained, cli, tmp_path
):
    before = tree(finished.folder)
    flags = [finished.delta, "--model", finished.model]
    document = explained(*flags, "--output", tmp_path / "out")
    assert document["tables"] == written(finished.folder)["tables"]
    assert (tmp_path / "out" / "explain.json").exists()
    outcome = cli("explain", *flags, "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "--overwrite" in outcome.error
    assert cli("explain", *flags, "--output", tmp_path / "out", "--overwrite").code == 0
    assert tree(finished.folder) == before


@pytest.mark.parametrize("method", ["full", "sparse", "elora"])
def test_two_checkpoints_are_explained_as_their_delta(
    cli, explained, finished, trusted_tiny, tmp_path, method
):
    """What could be trained is a guess for them; what moved is not."""
    run, tuned = tmp_path / "run", tmp_path / "tuned.pth"
    line = ["finetune", *finished.flags, "--output", run, "--method", method]
    line += ["--max-steps", 3, "--retention", "none", "--select", "linear,radial"]
    assert cli(*line).code == 0
    flags = ["--model", trusted_tiny, "--delta", run / "delta.safetensors"]
    assert cli("merge", *flags, "--output", tuned).code == 0
    of_run = written(run)
    of_files = explained("--base", trusted_tiny, "--tuned", tuned)
    for name in ("parameter", "layer", "degree", "element", "radial", "cell"):
        rows = of_run["tables"][name]
        found = of_files["tables"][name]
        keys = [
            k for k in rows[0] if k in found[0] and k in ("norm", "updated", "share")
        ]
        assert len(keys) == 3

        def moved(table, keys=keys):
            return [[row[k] for k in keys] for row in table if row["updated"]]

        assert moved(found) == moved(rows)
    if method == "full":
        assert of_files["tables"] == of_run["tables"]
        assert of_files["enrichment"] == of_run["enrichment"]
    shifts = DeltaFile.load(run / "delta.safetensors").shifts
    for element, shift in shifts.items():
        assert of_files["about"]["shifts"][element] == pytest.approx(shift, abs=1e-4)
    assert "not recorded" in " ".join(of_files["remarks"])


def test_a_checkpoint_equals_itself(explained, trusted_tiny):
    document = explained("--base", trusted_tiny, "--tuned", trusted_tiny)
    assert document["totals"]["updated"] == 0
    assert document["about"]["shifts"] == {}


def test_checkpoints_of_other_architectures_are_refused(cli, trusted_tiny):
    outcome = cli("explain", "--base", trusted_tiny, "--tuned", "7net-0")
    assert outcome.code == 1
    assert "differ in architecture, first in" in outcome.error


def test_undoing_everything_returns_the_error_of_the_base(finished, explained):
    """With the reference energies shifted; and undoing nothing that of the run."""
    results = json.loads((finished.folder / "metrics.json").read_text())
    document = explained(finished.folder, "--ablate")
    ablation = document["ablation"]
    assert (ablation["data"], ablation["n_structures"]) == ("test.xyz", 2)
    rows = ablation["rows"]
    assert [rows[0]["undone"], rows[-1]["undone"]] == ["nothing", "everything"]
    for key in ERRORS:
        assert rows[0][key] == pytest.approx(results["test"][key], rel=1e-5)
        assert rows[-1][key] == pytest.approx(results["zero_shot"][key], rel=1e-5)
    assert rows[0]["updated"] == 0
    updated = document["totals"]["updated"]
    assert rows[-1]["updated"] == updated
    layers = [r for r in rows if r["undone"] == "layer"]
    assert sum(r["updated"] for r in layers) == updated
    assert {r["value"] for r in rows if r["undone"] == "degree"} == {0, 1}
    assert {r["value"] for r in rows if r["undone"] == "element"} <= {"H", "C", "O"}
    assert all(r["forces_mae_mev_per_angstrom"] > 0 for r in rows)
    assert len({r["forces_mae_mev_per_angstrom"] for r in rows}) > 2
    assert (finished.folder / "explain" / "ablation.csv").exists()


def test_other_frames_can_be_named(finished, explained, tmp_path):
    document = explained(finished.folder, "--data", finished.train, "--frames", 3)
    assert document["ablation"]["n_structures"] == 3
    reference = api.evaluate(finished.train, finished.model, trust_checkpoint=True)
    assert reference["n_structures"] == 6


def test_what_changed_where_nothing_else_could(cli, finished, trusted_tiny, tmp_path):
    """A selection by degree: the tables show no other."""
    ase.io.write(tmp_path / "cu.xyz", crystals(4))
    line = ["finetune", "--model", trusted_tiny, "--train", tmp_path / "cu.xyz"]
    line += ["--output", tmp_path / "run", "--max-steps", 2, "--retention", "none"]
    assert cli(*line, "--select", "l=1", "--method", "full").code == 0
    document = written(tmp_path / "run")
    assert [r["degree"] for r in document["tables"]["degree"]] == [1]
    # It has no test frames; the validation frames lie in its folder.
    (tmp_path / "cu.xyz").unlink()
    outcome = cli("explain", tmp_path / "run", "--ablate", "--json")
    ablation = json.loads(outcome.out)["ablation"]
    assert ablation["data"] == "valid.xyz"
    undone = [(r["undone"], r["value"]) for r in ablation["rows"]]
    assert ("degree", 1) in undone
    assert ("degree", 0) not in undone


def test_several_runs_stand_side_by_side(cli, finished, trusted_tiny, tmp_path):
    runs = [finished.folder]
    for name, flags in {
        "seed1": ["--seed", 1],
        "random": ["--method", "random_support", "--max-updated-percent", 20],
    }.items():
        line = ["finetune", *finished.flags, "--output", tmp_path / name]
        line += ["--max-steps", 6, "--eval-every", 2, "--retention", "none", *flags]
        assert cli(*line).code == 0
        runs.append(tmp_path / name)
    outcome = cli("explain", *runs, "--output", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    (group,) = document["groups"]
    assert group["runs"] == [str(run) for run in runs[:2]]
    pairs = {(p["first"], p["second"]): p for p in document["pairs"]}
    seeds = pairs[str(runs[0]), str(runs[1])]
    assert group["stability"]["jaccard"] == pytest.approx(seeds["jaccard"])
    control = pairs[str(runs[0]), str(runs[2])]
    # A random support agrees as chance has it; the bound is on 400 of 2134 entries.
    assert abs(control["corrected"]) < 0.15
    assert (tmp_path / "out" / "comparison.json").exists()
    for row in document["cells"]:
        assert len(row["runs"]) == 3
    n_updated = [
        sum(r["runs"][i]["updated"] or 0 for r in document["cells"]) for i in range(3)
    ]
    counts = [written(run)["totals"]["updated"] for run in runs]
    assert n_updated == counts
    assert cli("explain", *runs).code == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--base and --tuned"),
        (["--base", "7net-0"], "--base and --tuned"),
        (["a", "--base", "7net-0", "--tuned", "7net-0"], "--base and --tuned"),
        (["a", "b", "--ablate"], "one run at a time"),
        (["missing"], "config.yaml is missing"),
        (["DELTA", "--model", "tiny", "--ablate"], "--data"),
    ],
)
def test_wrong_usage_is_said_in_one_line(cli, finished, args, words):
    outcome = cli("explain", *(finished.delta if a == "DELTA" else a for a in args))
    assert outcome.code == 2
    assert words in outcome.error


def test_the_element_axis_of_a_change_is_the_models(finished):
    """The embedding's rows by element, against the delta's own entries."""
    delta = DeltaFile.load(finished.delta)
    name = "onehot_to_feature_x.linear.weight"
    elements = delta.metadata["tensors"][name]["elements"]
    dense = delta.changes[name].dense().numpy().reshape(4, -1)
    counts = dict(zip(elements, (dense != 0).sum(axis=1), strict=True))
    rows = written(finished.folder)["tables"]["cell"]
    found = {r["element"]: r["updated"] for r in rows if r["layer"] == "embedding"}
    assert counts.pop("Cu") == 0
    assert found == counts


def test_a_run_is_shared_and_fetched(cli, finished, trusted_tiny, tmp_path):
    card = (finished.folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "tiny.pth"
    assert "pathtune finetune" in card
    assert "on the test frames (2 structures)" in card
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    assert cli("push", finished.folder, shared).code == 0
    assert (shared / "README.md").read_text(encoding="utf-8") == card
    fetch = ["pull", shared, "--output", mine, "--model", trusted_tiny, "--json"]
    outcome = cli(*fetch)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["base_checked"]
    fetched = mine / "delta.safetensors"
    assert fetched.read_bytes() == finished.delta.read_bytes()
    again = cli(*fetch)
    assert (again.code, "not empty" in again.error) == (2, True)
    # Without the base at hand a delta is fetched with a warning.
    outcome = cli("pull", shared, "--output", tmp_path / "blind")
    assert (outcome.code, "--model" in outcome.err) == (0, True)
    # Another base is refused, and nothing is left.
    other = cli("pull", shared, "--output", tmp_path / "other", "--model", "7net-0")
    assert (other.code, "differs from it" in other.error) == (1, True)
    assert not (tmp_path / "other").exists()
