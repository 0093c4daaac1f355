"""Selection and alive entries on hand-made records."""

from __future__ import annotations

import numpy as np
import pytest

from pathtune.errors import UsageError
from pathtune.paths import Path, PathWeight, alive_entries, select

EMBED = PathWeight(
    "embed.weight", (6,), "linear", "embedding", None,
    (Path(0, 6, (3, 2), "0e", "0e", element_axis=0),), ("H", "O", "Cu"),
)  # fmt: skip
MIX = PathWeight(
    "0.mix.weight", (10,), "linear", "interaction", 0,
    (
        Path(0, 4, (2, 2), "0e", "0e"),
        Path(4, 8, (2, 2), "1o", "1o"),
        Path(8, 10, (2, 1), "0e", "0e", head_axis=0),
    ),
    heads=("PBE", "R2SCAN"),
)  # fmt: skip
SKIP = PathWeight(
    "1.skip.weight", (12,), "fctp", "interaction", 1,
    (Path(0, 12, (2, 3, 2), "2e", "2e", element_axis=1),), ("H", "O", "Cu"),
)  # fmt: skip
RADIAL = PathWeight("1.radial", (4, 4), "radial", "interaction", 1)
READOUT = PathWeight(
    "readout.weight", (2,), "linear", "readout", None, (Path(0, 2, (2, 1), "0e", "0e"),)
)
SHIFT = PathWeight(
    "shift", (3,), "scale_shift", "readout", None,
    (Path(0, 3, (3,), "0e", "0e", element_axis=0),), ("H", "O", "Cu"),
)  # fmt: skip
ALL = [EMBED, MIX, SKIP, RADIAL, READOUT, SHIFT]


def counts(selection):
    return {name: int(mask.sum()) for name, mask in select(ALL, selection).items()}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("linear", {"embed.weight": 6, "0.mix.weight": 10, "readout.weight": 2}),
        ("fctp", {"1.skip.weight": 12}),
        ("readout", {"readout.weight": 2}),
        ("scale_shift", {"shift": 3}),
        ("name=shift", {"shift": 3}),
        ("l=0", {"embed.weight": 6, "0.mix.weight": 6, "readout.weight": 2}),
        ("layer=1", {"1.skip.weight": 12, "1.radial": 16}),
        ("layer=0-1&linear", {"0.mix.weight": 10}),
        ("l=1", {"0.mix.weight": 4}),
        ("l=1-2", {"0.mix.weight": 4, "1.skip.weight": 12}),
        ("name=^1", {"1.skip.weight": 12, "1.radial": 16}),
        ("l=1, readout&linear", {"0.mix.weight": 4, "readout.weight": 2}),
        ("kind=radial", {"1.radial": 16}),
    ],
)
def test_select(selection, expected):
    assert counts(selection) == expected


def test_all_is_linear_and_fctp_and_everything_leaves_the_shifts():
    assert set(counts("all")) == {w.name for w in (EMBED, MIX, SKIP, READOUT)}
    assert set(counts("everything")) == {w.name for w in ALL} - {"shift"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("linaer", "Did you mean 'linear'"),
        ("contraction", "matches no weight"),
        ("layer=7", "matches no weight"),
        ("fctp&l=0", "matches no weight"),
        ("layer=a", "number or a range"),
        ("name=(", "regular expression"),
        ("kind=linar", "Did you mean 'linear'"),
        ("degree=1", "unknown selection"),
        ("", "unknown selection"),
    ],
)
def test_select_refuses(selection, message):
    with pytest.raises(UsageError, match=message):
        select(ALL, selection)


def test_entries_of_absent_elements_and_other_heads_are_not_alive():
    alive = alive_entries(ALL, "all", ["H", "Cu"], "R2SCAN")
    assert alive["embed.weight"].tolist() == [0, 1, 4, 5]
    assert alive["0.mix.weight"].tolist() == [*range(8), 9]
    block = np.zeros(12, dtype=bool)
    block[alive["1.skip.weight"]] = True
    assert block.reshape(2, 3, 2)[:, 1].sum() == 0
    assert block.sum() == 8


def test_nothing_alive_is_an_error():
    with pytest.raises(UsageError, match="leaves nothing to train"):
        alive_entries(ALL, "fctp", ["N"], None)
