"""Delta: the module that owns every trainable tensor and yields merged weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathtune.deltafile import Change, exact_change
from pathtune.errors import UsageError
from pathtune.methods import base as methods
from pathtune.paths import PathWeight, alive_entries
from pathtune.properties import PROPERTIES, Property


class Delta(nn.Module):
    """Compute {parameter name: W + dW}; the foundation model is never touched.

    Parameters
    ----------
    model_weights
        The model's parameters by name, in the precision and on the device of the run.
    targets
        Trainable entries of each parameter.
    change
        The method's module; what dW is.
    layer
        Parameters of a layer that the base does not have, by name: initial values.
        They are trained plainly, whatever the method.
    layer_options
        Of the layer's optimizer group: lr, weight_decay.

    Raises
    ------
    KeyError, ValueError
        If a target's name or shape is not the model's; `functional_call` alone would
        ignore a misspelt name.
    """

    def __init__(
        self,
        model_weights: Mapping[str, Tensor],
        targets: Sequence[methods.Target],
        change: methods.Change,
        layer: Mapping[str, Tensor] | None = None,
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for target in targets:
            weight = target.weight
            if weight.name not in model_weights:
                raise KeyError(f"the model has no parameter {weight.name!r}")
            if (shape := tuple(model_weights[weight.name].shape)) != weight.shape:
                raise ValueError(
                    f"{weight.name} has shape {shape} in the model, {weight.shape} "
                    "in the selection"
                )
        self.targets = tuple(targets)
        self.change = change
        self._layer_names = tuple(layer or ())
        self._layer_options = dict(layer_options or {})
        self.layer = nn.ParameterList(
            t.detach().clone() for t in (layer or {}).values()
        )
        # Plain attributes, not buffers: the state dict of a delta holds dW only.
        self._base = [
            model_weights[t.weight.name].detach().clone() for t in self.targets
        ]
        self._indices: list[Tensor | None] = [
            None
            if t.size == t.weight.size
            else torch.from_numpy(t.indices).to(base.device)
            for t, base in zip(self.targets, self._base, strict=True)
        ]
        if self._base:
            self.to(self._base[0].device)

    def forward(self) -> dict[str, Tensor]:
        """Return the merged weight of every target, and the layer's, by name."""
        merged: dict[str, Tensor] = dict(
            zip(self._layer_names, self.layer, strict=True)
        )
        for target, base, indices, change in zip(
            self.targets, self._base, self._indices, self.change(), strict=True
        ):
            if indices is None:
                merged[target.weight.name] = base + change.view(base.shape)
            else:
                flat = base.flatten().index_add(0, indices, change.to(base.dtype))
                merged[target.weight.name] = flat.view(base.shape)
        return merged

    @torch.no_grad()
    def changes(self, stored: Mapping[str, Tensor]) -> dict[str, Change]:
        """Return what merging changes in the stored weights.

        Parameters
        ----------
        stored
            The base's parameters in the vendor's stored dtype.

        Returns
        -------
        dict
            Parameter name -> the entries whose merged value differs from the base.
        """
        result = {}
        for target, change in zip(self.targets, self.change(), strict=True):
            name = target.weight.name
            dense = torch.zeros(target.weight.size, dtype=torch.float64)
            dense[torch.from_numpy(target.indices)] = change.detach().cpu().double()
            merged = (stored[name].flatten().double() + dense).to(stored[name].dtype)
            found = exact_change(stored[name], merged.view(stored[name].shape))
            if len(found.indices):
                result[name] = found
        return result

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: the method's, then the layer's."""
        groups = self.change.param_groups()
        if len(self.layer):
            groups = [*groups, {"params": list(self.layer), **self._layer_options}]
        return groups

    def stored_layer(self) -> dict[str, Tensor]:
        """Return the layer's parameters as they are saved."""
        values = (p.detach().cpu().clone() for p in self.layer)
        return dict(zip(self._layer_names, values, strict=True))

    @property
    def trainable(self) -> int:
        """Number of trainable numbers."""
        return self.change.trainable + self.new

    @property
    def new(self) -> int:
        """Number of parameters of the layer."""
        return sum(p.numel() for p in self.layer)

    @property
    def alive(self) -> int:
        """Number of selected entries that the method can change."""
        return sum(t.size for t in self.targets)


def build(
    path_weights: Sequence[PathWeight],
    model_weights: Mapping[str, Tensor],
    *,
    method: Any,
    config: methods.MethodConfig,
    selection: str,
    elements: Sequence[str],
    head: str | None,
    seed: int,
    properties: Sequence[Property] = PROPERTIES,
    layer: Mapping[str, Tensor] | None = None,
    layer_options: Mapping[str, Any] | None = None,
) -> Delta:
    """Build the delta of a run: selection, alive entries, method.

    Parameters
    ----------
    path_weights
        Every parameter of the model.
    model_weights
        The parameters themselves, by name.
    method
        Module of the method (`pathtune.methods`).
    config
        Its settings.
    selection
        See `pathtune.paths.select`.
    elements
        Elements of the training data.
    head
        Active head of the model.
    seed
        Seed of the method's initial values.
    properties
        What is trained.
    layer, layer_options
        See `Delta`.

    Raises
    ------
    UsageError
        If nothing is left to train, or nothing the method can change.
    """
    alive = alive_entries(path_weights, selection, elements, head, properties)

    def target(weight: PathWeight) -> methods.Target:
        indices = np.asarray(alive[weight.name])
        base = model_weights[weight.name].detach().flatten().cpu()
        return methods.Target(weight, indices, base[torch.from_numpy(indices)])

    covered = [w for w in path_weights if method.Change.covers(w)]
    targets = [target(w) for w in covered if w.name in alive]
    if not targets:
        name = method.__name__.rpartition(".")[2]
        raise UsageError(
            f"method {name!r} changes nothing that selection {selection!r} leaves to "
            f"train; in this model it can change {_listed({w.kind for w in covered})}"
        )
    dtype = next(iter(model_weights.values())).dtype
    change = method.Change(
        config,
        targets,
        total_parameters=sum(w.size for w in path_weights),
        dtype=dtype,
        generator=torch.Generator().manual_seed(seed),
    )
    return Delta(model_weights, targets, change, layer, layer_options)


def _listed(kinds: Collection[str]) -> str:
    return ", ".join(sorted(kinds)) or "no weight"


def sparsity(updated: int, alive: int, total: int, new: int = 0) -> dict[str, Any]:
    """Return the counts of a run.

    Parameters
    ----------
    updated
        Entries whose merged value differs from the base, and the new ones.
    alive
        Selected entries of the base that the method can change.
    total
        Elements of all named parameters of the base, and the new ones.
    new
        Parameters of a layer that the base does not have.

    Returns
    -------
    dict
        ``total_sparsity`` = 1 - updated / total (the paper's), ``active_sparsity`` =
        1 - (updated - new) / alive, and the counts; ``new_parameters`` where there are
        any.
    """
    counts = {
        "total_sparsity": 1 - updated / total,
        "active_sparsity": 1 - (updated - new) / alive,
        "updated_parameters": updated,
        "alive_parameters": alive,
        "total_parameters": total,
    }
    return counts | ({"new_parameters": new} if new else {})
