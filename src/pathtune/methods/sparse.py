"""Sparse: dW is a dense tensor behind a learnable soft threshold (STR).

References
----------
Cho et al., Robust and Interpretable Adaptation of Equivariant Materials Foundation
Models via Sparsity-promoting Fine-tuning, ICLR 2026, arXiv 2606.18691.
Kusupati et al., Soft Threshold Weight Reparameterization, ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pathtune.methods import support

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "low": {"tau_weight_decay": 0.01},
    "high": {"tau_weight_decay": 0.3, "max_updated_percent": 3.0},
}


class ThresholdConfig(support.Config):
    """Settings of a learnable threshold; `max_updated_percent` None is as published.

    Parameters
    ----------
    init_std
        Standard deviation σ of dW at the start.
    initial_threshold
        δ at the start; τ starts at logit(δ).
    tau_per
        One threshold for each parameter (``layer``) or each irreps path (``path``).
    """

    lr: float = Field(1e-2, gt=0)
    init_std: float = Field(0.01, gt=0)
    initial_threshold: float = Field(1e-3, gt=0, lt=1)
    tau_per: Literal["layer", "path"] = "layer"


class Config(ThresholdConfig):
    """Settings of the sparse method; the names follow the paper's symbols.

    Parameters
    ----------
    lr, weight_decay
        Of the dense update dW (η, λ_Δ).
    tau_lr, tau_weight_decay
        Of the threshold logit (η_τ, λ_τ); `tau_lr` None means `lr`. Decay pulls τ
        towards 0, so more decay means a larger threshold: sparser.
    """

    weight_decay: float = Field(1e-8, ge=0)
    tau_lr: float | None = Field(None, gt=0)
    tau_weight_decay: float = Field(0.01, ge=0)


def soft_threshold(delta: Tensor, threshold: Tensor) -> Tensor:
    """S(dW, δ) = sign(dW) ReLU(|dW| - δ); arXiv 2606.18691, soft threshold of STR.

    Parameters
    ----------
    delta
        dW, any shape.
    threshold
        δ, broadcastable.
    """
    return delta.sign() * torch.relu(delta.abs() - threshold)


class Change(support.Change):
    """dW = S(dW, sigmoid(τ)), one τ for each layer or path.

    The dense dW stays the parameter and the threshold acts in the forward pass only:
    an entry can come back when δ falls, and autograd through sign and ReLU gives the
    paper's gradients exactly. A refit of the survivors undoes their shrinkage by δ.
    """

    is_zero_at_start: ClassVar[bool] = False

    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Draw dW ~ N(0, σ²); set τ = logit(δ)."""
        per_path = self.config.tau_per == "path"
        self._sizes = [t.path_sizes() if per_path else [t.size] for t in self.targets]
        total = sum(t.size for t in self.targets)
        noise = torch.randn(total, generator=generator, dtype=torch.float64)
        start = self.config.initial_threshold
        logit = math.log(start / (1 - start))
        segments = sum(len(s) for s in self._sizes)
        self.own((self.config.init_std * noise).to(dtype))
        self.tau = nn.Parameter(torch.full((segments,), logit, dtype=dtype))

    def free(self) -> list[Tensor]:
        """Return S(dW, sigmoid(τ)) of each target."""
        sizes = [n for segments in self._sizes for n in segments]
        thresholds = torch.sigmoid(self.tau).unbind()
        parts = [
            soft_threshold(delta, threshold)
            for delta, threshold in zip(
                self.delta.split(sizes), thresholds, strict=True
            )
        ]
        changes = []
        for segments in self._sizes:
            own, parts = parts[: len(segments)], parts[len(segments) :]
            changes.append(own[0] if len(own) == 1 else torch.cat(own))
        return changes

    def free_groups(self) -> list[dict[str, Any]]:
        """Return {dW: η, λ_Δ} and {τ: η_τ, λ_τ}."""
        config = self.config
        tau_lr = config.lr if config.tau_lr is None else config.tau_lr
        return [
            {
                "params": [self.delta],
                "lr": config.lr,
                "weight_decay": config.weight_decay,
            },
            {
                "params": [self.tau],
                "lr": tau_lr,
                "weight_decay": config.tau_weight_decay,
            },
        ]

    def thresholds(self) -> Mapping[str, list[float]]:
        """Return δ = sigmoid(τ) of each parameter (one, or one for each path)."""
        if self.is_fixed:
            return {}
        values = iter(torch.sigmoid(self.tau.detach()).tolist())
        return {
            target.weight.name: [next(values) for _ in segments]
            for target, segments in zip(self.targets, self._sizes, strict=True)
        }
