"""The model card: valid metadata, what was measured and nothing else."""

from __future__ import annotations

import pytest
import yaml

from pathtune import modelcard
from tests.unit.test_deltafile import make, weights

ERRORS = {
    "zero_shot": {
        "n_structures": 4,
        "energy_mae_mev_per_atom": 6.5,
        "forces_mae_mev_per_angstrom": 252.0,
        "forces_rmse_mev_per_angstrom": 300.0,
        "magmom_mae_mu_b": 0.5,
    },
    "valid": {"n_structures": 2, "energy_mae_mev_per_atom": 1.0},
    "test": {
        "n_structures": 4,
        "energy_mae_mev_per_atom": 0.83,
        "forces_mae_mev_per_angstrom": 29.4,
        "forces_rmse_mev_per_angstrom": 40.0,
        "magmom_mae_mu_b": 0.04321,
    },
}
SPARSITY = {
    "updated_parameters": 30,
    "alive_parameters": 100,
    "total_parameters": 1000,
}
RETENTION = {
    "n_structures": 40,
    "energy_drift_mev_per_atom": 26.6,
    "forces_drift_mev_per_angstrom": 24.8,
    "forces_base_mev_per_angstrom": 168.0,
    "dimers": {
        "n_pairs": 6,
        "base_hole_fraction": 0.0,
        "hole_fraction": 0.5,
        "new_holes": ["H-O"],
    },
    "nve": {
        "n_atoms": 9,
        "n_steps": 17,
        "time_step_fs": 0.5,
        "exploded": True,
        "energy_drift_mev_per_atom_per_ps": None,
    },
}


def a_delta(**metadata):
    return make(
        weights(),
        model="7net-0",
        backend="sevennet",
        method={"name": "sparse", "config": {}},
        select="all",
        seed=0,
        level_of_theory="r2SCAN",
        data={"train": "abc123", "n_train": 50, "n_replay": 0},
        metrics=ERRORS,
        sparsity=SPARSITY,
        versions={"torch": "2.13.0"},
        **{"licence": "MIT", **metadata},
    )


def parts(card):
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_header_is_what_a_hub_reads():
    header, _ = parts(modelcard.render(a_delta(), name="run"))
    assert header["license"] == "mit"
    assert header["base_model"] == "7net-0"
    assert header["library_name"] == "pathtune"
    assert {"sevennet", "H"} <= set(header["tags"])
    (model,) = header["model-index"]
    metrics = {m["name"]: m["value"] for m in model["results"][0]["metrics"]}
    assert metrics == {
        "energy MAE (meV/atom)": 0.83,
        "forces MAE (meV/Å)": 29.4,
        "magmom MAE (μ_B)": 0.043,
    }


def test_the_header_is_valid_for_the_hubs_own_reader():
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(modelcard.render(a_delta(), name="run"))
    assert card.data.license == "mit"
    (energy, *_) = card.data.eval_results
    assert (energy.metric_type, energy.metric_value) == ("mae", 0.83)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", ("mit", None)),
        ("Academic Software License", ("other", "academic-software-license")),
        ("that of the foundation model", ("other", "that-of-the-foundation-model")),
    ],
)
def test_the_licence_is_that_of_the_base(licence, expected):
    card = modelcard.render(a_delta(licence=licence), name="run")
    header, body = parts(card)
    assert (header["license"], header.get("license_name")) == expected
    assert f"licence: {licence}" in body


def test_what_was_measured_is_said():
    results = {
        **ERRORS,
        "sparsity": SPARSITY,
        "retention": RETENTION,
        "data": {"train": {"labels": {"energy": 50, "forces": 50}}},
    }
    command = "pathtune finetune --model 7net-0"
    card = modelcard.render(a_delta(), name="run", results=results, command=command)
    _, body = parts(card)
    for text in (
        "| energy | 6.50 | 0.83 | meV/atom |",
        "| magmom | 0.500 | 0.043 | μ_B |",
        "on the test frames (4 structures)",
        "50 training structures",
        "50 energy, 50 forces",
        "30 of 1000 parameters (3.00 %)",
        "50 % of 6 (base: 0 %); new: H-O",
        "**it exploded**",
        "level r2SCAN",
        "`abc123`",
        f"`{command}`",
        "--model 7net-0 --delta delta.safetensors --output tuned.pth",
    ):
        assert text in body
    assert "optimistic" not in body


def test_errors_on_validation_frames_are_called_optimistic():
    results = {**ERRORS, "test": None, "sparsity": SPARSITY}
    _, body = parts(modelcard.render(a_delta(), name="run", results=results))
    assert "on the validation frames (2 structures; they chose" in body
    assert "| energy | 6.50 | 1.00 | meV/atom |" in body


def test_what_was_not_measured_is_left_out():
    derived = a_delta().scale(0.5)
    header, body = parts(modelcard.render(derived, name="half"))
    assert "model-index" not in header
    for absent in ("## Errors", "What was forgotten", "command:", "None", "{'"):
        assert absent not in body
    assert "a combination of other deltas" in body
    assert "level of theory: not stated" in body


def test_a_base_that_is_a_file_is_said_to_be_one():
    _, body = parts(modelcard.render(a_delta(), name="run"))
    assert "is a checkpoint file" not in body
    own = a_delta()
    own.metadata["model"] = "mine.pth"
    _, body = parts(modelcard.render(own, name="run"))
    assert "is a checkpoint file" in body


def test_names_do_not_break_the_header():
    card = modelcard.render(a_delta(), name='a: "b" # {{ c }}')
    header, body = parts(card)
    assert header["model-index"][0]["name"] == 'a: "b" # {{ c }}'
    assert '# a: "b" # {{ c }}' in body


def test_tables_and_lists_are_not_torn_apart():
    _, body = parts(modelcard.render(a_delta(), name="run"))
    lines = body.splitlines()
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if before.startswith("|") and after.startswith("|"):
            assert line.startswith("|")
        if before.startswith("- ") and after.startswith("- "):
            assert line.startswith("- ")
        if line.startswith("## "):
            assert before == after == ""
    assert body.count("```") == 4
