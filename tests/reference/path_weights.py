"""Path weights written by hand: two published MACE architectures, and a small model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from pathtune.methods import base
from pathtune.paths import Path, PathWeight

CHANNELS = 128
ALL_IRREPS = ("0e", "1o", "2e", "3o")


def _layer(
    name: str,
    kind: str,
    role: str,
    layer: int | None,
    blocks: Iterable[tuple[tuple[int, ...], str, int, int]],
    *,
    elements: Sequence[str] = (),
    element_axis: int | None = None,
) -> PathWeight:
    """Return a flat e3nn weight of blocks (shape, irrep, input block, output block)."""
    paths, start = [], 0
    for shape, irrep, block_in, block_out in blocks:
        stop = start + math.prod(shape)
        axis = element_axis
        paths.append(
            Path(start, stop, shape, irrep, irrep, axis, None, block_in, block_out)
        )
        start = stop
    return PathWeight(name, (start,), kind, role, layer, tuple(paths), tuple(elements))


def mace(
    elements: Sequence[str],
    *,
    bessel: int,
    hidden: Sequence[str],
    skip: Sequence[str],
    paths_in: Mapping[str, int],
    couplings: Mapping[str, Sequence[int]],
    simplified: bool,
) -> list[PathWeight]:
    """Return the weights of a MACE with two layers, 128 channels and l_max 3.

    Parameters
    ----------
    elements
        Element table.
    bessel
        Number of radial basis functions.
    hidden
        Irreps of the features between the layers.
    skip
        Output irreps of the first layer's skip connection.
    paths_in
        For each irrep the paths of the second tensor product that end in it.
    couplings
        Couplings of the product basis to each irrep: highest order, lower orders.
    simplified
        Whether paths of an equal irrep are one block of 128 n channels, as in early
        versions, or n blocks.
    """
    c, n = CHANNELS, len(elements)
    records = []

    def linear(name, layer, blocks, role="interaction"):
        records.append(_layer(name, "linear", role, layer, blocks))

    def diagonal(irreps):
        return [((c, c), ir, i, i) for i, ir in enumerate(irreps)]

    def radial(layer, n_out):
        for i, shape in enumerate([(bessel, 64), (64, 64), (64, 64), (64, n_out)]):
            name = f"interactions.{layer}.conv_tp_weights.layer{i}.weight"
            records.append(PathWeight(name, shape, "radial", "interaction", layer))

    def skip_tp(layer, irreps):
        blocks = [((c, n, c), ir, 0, i) for i, ir in enumerate(irreps)]
        name = f"interactions.{layer}.skip_tp.weight"
        records.append(
            _layer(
                name, "fctp", "interaction", layer, blocks,
                elements=elements, element_axis=1,
            )
        )  # fmt: skip

    def contraction(layer, index, irrep):
        owner = f"products.{layer}.symmetric_contractions.contractions.{index}"
        leaves = ("weights_max", "weights.0", "weights.1")
        for leaf, m in zip(leaves, couplings[irrep], strict=True):
            path = Path(0, n * m * c, (n, m, c), "+".join(ALL_IRREPS), irrep, 0)
            records.append(
                PathWeight(
                    f"{owner}.{leaf}", (n, m, c), "contraction", "interaction",
                    layer, (path,), tuple(elements),
                )
            )  # fmt: skip

    records.append(
        _layer(
            "node_embedding.linear.weight", "linear", "embedding", None,
            [((n, c), "0e", 0, 0)], elements=elements, element_axis=0,
        )
    )  # fmt: skip
    records.append(
        PathWeight("radial_embedding.bessel", (bessel,), "radial", "embedding")
    )
    linear("interactions.0.linear_up.weight", 0, diagonal(["0e"]))
    radial(0, 4 * c)
    linear("interactions.0.linear.weight", 0, diagonal(ALL_IRREPS))
    skip_tp(0, skip)
    linear("interactions.1.linear_up.weight", 1, diagonal(hidden))
    radial(1, c * sum(paths_in.values()))
    blocks, block_in = [], 0
    for block_out, (irrep, count) in enumerate(paths_in.items()):
        for _ in range(1 if simplified else count):
            mul_in = c * count if simplified else c
            blocks.append(((mul_in, c), irrep, block_in, block_out))
            block_in += 1
    linear("interactions.1.linear.weight", 1, blocks)
    skip_tp(1, ["0e"])
    for layer, irreps in enumerate([hidden, ["0e"]]):
        for index, irrep in enumerate(irreps):
            contraction(layer, index, irrep)
        linear(f"products.{layer}.linear.weight", layer, diagonal(irreps))
    for name, shape in (
        ("0.linear", (c, 1)),
        ("1.linear_1", (c, 16)),
        ("1.linear_2", (16, 1)),
    ):
        linear(f"readouts.{name}.weight", None, [(shape, "0e", 0, 0)], "readout")
    return records


def mace_off23_medium(*, simplified: bool) -> list[PathWeight]:
    """Return MACE-OFF23 medium cut to three elements: 751 896 parameters."""
    return mace(
        ("H", "C", "O"),
        bessel=8,
        hidden=("0e", "1o"),
        skip=ALL_IRREPS,
        paths_in={"0e": 2, "1o": 3, "2e": 3, "3o": 2},
        couplings={"0e": (23, 4, 1), "1o": (51, 6, 1)},
        simplified=simplified,
    )


def mace_mp_l2() -> list[PathWeight]:
    """Return MACE-MP-0 with l = 2 features, cut to one element: 723 866 parameters."""
    return mace(
        ("Cu",),
        bessel=10,
        hidden=("0e", "1o", "2e"),
        skip=("0e",),
        paths_in={"0e": 3, "1o": 5, "2e": 5, "3o": 4},
        couplings={"0e": (23, 4, 1), "1o": (51, 6, 1), "2e": (65, 7, 1)},
        simplified=True,
    )


ELEMENTS = ("H", "C", "O")
PRESENT = ("H", "O")


def small() -> list[PathWeight]:
    """Return a weight of every sort, three elements wide; carbon is to be absent."""
    return [
        _layer(
            "embedding", "linear", "embedding", None,
            [((3, 4), "0e", 0, 0)], elements=ELEMENTS, element_axis=0,
        ),
        _layer(
            "linear", "linear", "interaction", 0,
            [((2, 3), "0e", 0, 0), ((2, 2), "0e", 0, 1), ((4, 3), "0e", 1, 0)],
        ),
        _layer(
            "fctp", "fctp", "interaction", 0,
            [((2, 3, 4), "0e", 0, 0), ((3, 3, 2), "1o", 1, 1)],
            elements=ELEMENTS, element_axis=1,
        ),
        PathWeight(
            "weights_max", (3, 2, 4), "contraction", "interaction", 0,
            (Path(0, 24, (3, 2, 4), "0e+1o", "0e", 0),), ELEMENTS,
        ),
        PathWeight(
            "weights.0", (3, 1, 4), "contraction", "interaction", 0,
            (Path(0, 12, (3, 1, 4), "0e+1o", "0e", 0),), ELEMENTS,
        ),
        PathWeight("bessel", (5,), "radial", "embedding"),
        # Its last but one entry is never used: the trainable ones are no full matrix.
        PathWeight("radial", (3, 4), "radial", "interaction", 0, unused=(10,)),
        PathWeight("bias", (4,), "other", "interaction", 0),
    ]  # fmt: skip


def values(weights: Iterable[PathWeight], std: float = 1.0) -> dict[str, torch.Tensor]:
    """Return random values of all weights, in float64."""
    generator = torch.Generator().manual_seed(7)
    return {
        w.name: std * torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for w in weights
    }


def targets(weights: Sequence[PathWeight] | None = None) -> list[base.Target]:
    """Return the alive entries of the small model, by brute force."""
    weights = small() if weights is None else weights
    drawn = values(weights)
    result = []
    for weight in weights:
        alive = []
        for path in weight.paths or (Path(0, weight.size, weight.shape, "0e", "0e"),):
            for flat, place in enumerate(np.ndindex(*path.shape)):
                axis = path.element_axis
                present = axis is None or weight.elements[place[axis]] in PRESENT
                if present and path.start + flat not in weight.unused:
                    alive.append(path.start + flat)
        indices = np.array(alive)
        base_values = drawn[weight.name].flatten()[torch.from_numpy(indices)]
        result.append(base.Target(weight, indices, base_values))
    return result
