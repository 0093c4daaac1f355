"""Method lora on a MACE against the vendor's own LoRA: same numbers, same weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import pathtune
from pathtune import delta as deltas
from pathtune.backends.base import undisturbed
from pathtune.methods import lora
from tests.backends.families import FAMILIES

pytestmark = pytest.mark.mace
RANK, ALPHA = 3, 2.0


@pytest.fixture(scope="module")
def base():
    model = FAMILIES["mace"].model
    return pathtune.load(model, device="cpu", dtype="float64", trust_checkpoint=True)


def layers(vendor):
    """Return the vendor's low-rank layers by the name of the parameter they change."""
    return {
        f"{name}.weight": module
        for name, module in vendor.named_modules()
        if hasattr(module, "lora_A")
    }


def factor(module, which, block):
    """Return the vendor's A of an input block, or its B of an output block."""
    layer = getattr(module, f"lora_{which}")
    if isinstance(layer, torch.nn.Parameter):  # of a radial network
        return layer
    start = 0
    for instruction in layer.instructions:
        rows, columns = instruction.path_shape
        if block == (instruction.i_in if which == "A" else instruction.i_out):
            return layer.weight[start : start + rows * columns].view(rows, columns)
        start += rows * columns
    raise LookupError(block)


def test_the_change_is_the_vendors(base):
    with undisturbed(torch.float64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mace.modules.lora import inject_LoRAs, merge_lora_weights

        vendor = copy.deepcopy(base.model)
        inject_LoRAs(vendor, rank=RANK, alpha=ALPHA)
    named = dict(base.model.named_parameters())
    delta = deltas.build(
        base.path_weights(),
        named,
        method=lora,
        config=lora.Config(rank=RANK, alpha=ALPHA),
        selection=lora.Config.select,
        elements=base.elements,
        head=base.head,
        seed=0,
    )
    theirs = [p for p in vendor.parameters() if p.requires_grad]
    assert delta.change.trainable == sum(p.numel() for p in theirs)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs:
        parameter.data.normal_(generator=generator)
    changed = layers(vendor)
    assert set(changed) == {t.weight.name for t in delta.targets}
    with torch.no_grad():
        for target, part in zip(delta.targets, delta.change.parts, strict=True):
            module, paths = changed[target.weight.name], target.weight.paths
            for which, ours in (("A", part.a), ("B", part.b)):
                side = "block_in" if which == "A" else "block_out"
                blocks = dict.fromkeys(getattr(path, side) for path in paths) or [None]
                for parameter, block in zip(ours, blocks, strict=True):
                    parameter.copy_(factor(module, which, block))
        merged = dict(merge_lora_weights(vendor).named_parameters())
        for name, weight in delta().items():
            assert not torch.equal(weight, named[name])
            assert torch.allclose(weight, merged[name], rtol=1e-14, atol=1e-14), name
