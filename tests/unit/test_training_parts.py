"""Loss, order of frames, configuration, files: without a backend."""

from __future__ import annotations

import os

import ase
import numpy as np
import pytest
import torch

from pathtune import files, trust
from pathtune.config import RunConfig, assign, read_yaml, validate
from pathtune.errors import PathtuneError, UsageError, unknown
from pathtune.metrics import errors, errors_by_config_type
from pathtune.properties import Structure
from pathtune.training import checkpoint
from pathtune.training.data import batch_indices
from pathtune.training.log import read_metrics
from pathtune.training.loss import collate, labels_of, loss_terms
from tests.reference import huber as twin

RNG = np.random.default_rng(0)


def structure(symbols, labels, **more):
    n = len(ase.Atoms(symbols))
    shapes = {"energy": (), "forces": (n, 3), "stress": (6,)}
    made = {name: RNG.normal(size=shapes[name]) for name in labels}
    return Structure(
        ase.Atoms(symbols, positions=RNG.normal(size=(n, 3))), made, **more
    )


def test_loss_is_the_twins_with_masks_and_weights():
    structures = [
        structure("H2O", ["energy", "forces"], weight=2.0),
        structure("O2", ["forces", "stress"], property_weights={"forces": 0.5}),
        structure("H", ["energy", "stress"], weight=0.0),
    ]
    shifts = {"H": -1.0, "O": 2.5}
    predicted = {
        "energy": torch.from_numpy(RNG.normal(size=3)),
        "forces": torch.from_numpy(RNG.normal(size=(6, 3))),
        "stress": torch.from_numpy(RNG.normal(size=(3, 6))),
    }
    labels = collate([labels_of(s, shifts) for s in structures])
    terms = loss_terms(predicted, labels, 0.7)

    water = structures[0]
    residual = water.labels["energy"] - (2 * -1.0 + 2.5)
    energy = twin.term([(predicted["energy"][0].item() - residual) / 3], [2.0], 0.7)
    flat = predicted["forces"].numpy()
    pairs = [(flat[:3] - water.labels["forces"], 2.0)]
    pairs += [(flat[3:5] - structures[1].labels["forces"], 0.5)]
    forces = twin.term(
        [d for block, _ in pairs for d in block.ravel()],
        [w for block, w in pairs for _ in block.ravel()],
        0.7,
    )
    stress = twin.term(
        (predicted["stress"][1].numpy() - structures[1].labels["stress"]), [1] * 6, 0.7
    )
    assert terms["energy"].item() == pytest.approx(energy, abs=1e-12)
    assert terms["forces"].item() == pytest.approx(forces, abs=1e-12)
    assert terms["stress"].item() == pytest.approx(stress, abs=1e-12)


def test_a_missing_stress_does_not_let_a_nan_through():
    labels = collate([labels_of(structure("H", ["energy"]), {})])
    predicted = {"stress": torch.full((1, 6), float("nan"))}
    assert loss_terms(predicted, labels, 0.01)["stress"].item() == 0


def test_large_offsets_are_subtracted_before_rounding():
    s = Structure(ase.Atoms("O2"), {"energy": np.float64(-4070.0 - 1e-4)})
    labels = labels_of(s, {"O": -2035.0}).to(torch.device("cpu"), torch.float32)
    assert labels.energy.item() == pytest.approx(-1e-4, rel=1e-3)


def test_every_epoch_sees_every_frame_once():
    n, batch = 7, 3
    seen = [
        i
        for step in range(n * 4 // batch + 1)
        for i in batch_indices(1, step, batch, n)
    ]
    for epoch in range(4):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert batch_indices(1, 5, batch, n) == batch_indices(1, 5, batch, n)
    assert seen[:n] != seen[n : 2 * n]
    assert [batch_indices(2, 0, n, n)] != [batch_indices(1, 0, n, n)]


def test_metrics_have_units_in_their_names_and_both_norms():
    s = structure("H2O", ["energy", "forces"])
    shifted = {"energy": s.labels["energy"] + 0.3, "forces": s.labels["forces"] + 0.01}
    shifted["forces"][0, 0] += 0.9
    result = errors([s], [shifted])
    assert result["energy_mae_mev_per_atom"] == pytest.approx(100)
    assert result["forces_mae_mev_per_angstrom"] == pytest.approx((9 * 10 + 900) / 9)
    assert result["forces_rmse_mev_per_angstrom"] == pytest.approx(
        np.sqrt((8 * 10**2 + 910**2) / 9)
    )
    assert "stress_mae_mev_per_angstrom3" not in result
    assert errors_by_config_type([s], [shifted]) == {}


def test_config_is_a_fixed_point_of_its_yaml(tmp_path):
    config = RunConfig(model="7net-0", train="a.xyz", method_options={"lr": 0.1})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert validate(RunConfig, read_yaml(tmp_path / "c.yaml"), "setting") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1}, "unknown setting 'lerning_rate'"),
        ({"max_step": 1}, "Did you mean 'max_steps'"),
        ({"lr": -1}, "'lr' = -1"),
        ({"lr": float("nan")}, "'lr' = nan"),
        ({"dtype": "float16"}, "float32"),
        ({"valid_fraction": 1.5}, "valid_fraction"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(UsageError, match=message):
        validate(RunConfig, {"model": "m", "train": "t", **settings}, "setting")


def test_required_settings_are_named():
    with pytest.raises(UsageError, match="'train' is required"):
        validate(RunConfig, {"model": "m"}, "setting")


def test_assign_reads_yaml_and_nests():
    settings: dict = {"model": "m"}
    assign(settings, "method_options.tau_lr=0.5")
    assign(settings, "seed=3")
    assert settings == {"model": "m", "method_options": {"tau_lr": 0.5}, "seed": 3}
    for bad in ("seed", "=3", "seed.x=1"):
        with pytest.raises(UsageError, match="--set"):
            assign(settings, bad)


def test_unknown_names_the_nearest_match():
    message = unknown("method", "Spars", ["sparse", "full"])
    assert (
        message == "unknown method 'Spars'; known: full, sparse. Did you mean 'sparse'?"
    )
    assert "Did you mean" not in unknown("method", "zzz", ["sparse"])


def test_failed_writes_leave_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(PathtuneError, match="No space left"):
        files.write_atomically(path, fail)
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert os.listdir(tmp_path) == ["x.json"]


def test_new_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_trust_by_release_by_list_and_by_flag(tmp_path):
    path = tmp_path / "m.pth"
    path.write_bytes(b"content")
    with pytest.raises(PathtuneError, match=files.sha256(path)):
        trust.require(path, [])
    trust.require(path, [files.sha256(path)])
    with pytest.raises(PathtuneError):
        trust.require(path, [])
    trust.require(path, [], trust=True)
    trust.require(path, [])
    path.write_bytes(b"other content")
    with pytest.raises(PathtuneError, match="--trust-checkpoint"):
        trust.require(path, [])


def test_a_torn_metrics_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [r["step"] for r in read_metrics(path)] == [0, 1]


class Malicious:
    """Unpickling it would call a function."""

    def __reduce__(self):
        return os.mkdir, ("proof-of-code",)


def test_checkpoints_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = checkpoint.path_in(tmp_path)
    target.parent.mkdir()
    torch.save({"state": Malicious()}, target)
    with pytest.raises(PathtuneError, match="damaged"):
        checkpoint.read(tmp_path)
    assert not (tmp_path / "proof-of-code").exists()
    assert checkpoint.read(tmp_path / "elsewhere") is None
