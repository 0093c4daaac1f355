"""The contract of a method: what the change dW of the selected weights is.

A method's file has three public names: ``Config`` (a frozen `MethodConfig`, the full
identity of the method), ``PRESETS`` (name -> settings) and ``Change`` (the module
that owns the trainable tensors). Merging, counting and saving are not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pathtune.paths import PathWeight


class MethodConfig(BaseModel):
    """What every method's settings have; ``--lr`` sets the field ``lr``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: Entries a newcomer gets when ``--select`` is not given.
    select: ClassVar[str] = "all"


@dataclass(frozen=True, eq=False)
class Target:
    """The trainable entries of one parameter.

    Parameters
    ----------
    weight
        The record of the parameter.
    indices
        Flat indices of its selected, alive entries; int64, ascending.
    base
        The foundation model's values of these entries, shape (size,), on the CPU.
    """

    weight: PathWeight
    indices: np.ndarray
    base: Tensor

    @property
    def size(self) -> int:
        """Number of trainable entries."""
        return len(self.indices)

    def path_sizes(self) -> list[int]:
        """Trainable entries in each path, in order; [size] without paths."""
        starts = [p.start for p in self.weight.paths] or [0]
        edges = np.searchsorted(self.indices, [*starts, self.weight.size])
        return [int(n) for n in np.diff(edges) if n]


class Change(nn.Module, ABC):
    """dW as a function of the method's own trainable tensors."""

    #: Whether dW is exactly zero before the first step.
    is_zero_at_start: ClassVar[bool]

    def __init__(
        self,
        config: Any,
        targets: Sequence[Target],
        *,
        total_parameters: int,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.config = config
        self.targets = tuple(targets)
        self.total_parameters = total_parameters
        self.initialise(dtype, generator)

    @classmethod
    def covers(cls, weight: PathWeight) -> bool:
        """Whether the method can change this parameter where it is selected."""
        return True

    @property
    def trainable(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters())

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a tensor over all targets' entries into one of each target."""
        return list(flat.split([t.size for t in self.targets]))

    @abstractmethod
    def initialise(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        """Create the trainable tensors (on the CPU, from `generator`)."""

    @abstractmethod
    def forward(self) -> list[Tensor]:
        """Return dW of each target's entries, shape (target.size,), in order."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: params, lr, weight_decay.

        No group trains nothing.
        """

    @property
    def phase_share(self) -> float:
        """The share of the steps that the current phase takes; for its warm-up."""
        return 1.0

    @property
    def phase_pending(self) -> bool:
        """Whether a phase is still to come; early stopping waits for it."""
        return False

    def phase_due(self, progress: float) -> bool:
        """Whether a new phase of the method begins at this share of the steps.

        The answer is a function of `progress` and the module's state dict alone, so
        that a resumed run is the same run.
        """
        return False

    def begin_phase(self) -> None:
        """Begin the phase that is due; the module holds the averaged iterate.

        The optimizer starts afresh from `param_groups`, and the best iterate is chosen
        anew: what came before the phase is not what the method hands back.
        """

    def thresholds(self) -> Mapping[str, list[float]]:
        """Return each parameter's thresholds, where the method has any."""
        return {}
