"""Predicting many structures: graphs built once, batches by number of structures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pathtune.backends.base import Backend
from pathtune.properties import BY_ATOM, Prediction, Property, Structure
from pathtune.structures.survey import survey


def predict(
    backend: Backend,
    structures: Sequence[Structure],
    *,
    weights: Mapping[str, Tensor] | None = None,
    shifts: Mapping[str, float] | None = None,
    properties: Collection[Property] | None = None,
    graphs: Sequence[Any] | None = None,
    batch_size: int = 16,
    advance: Callable[[int], object] | None = None,
) -> list[Prediction]:
    """Predict structures with merged weights and shifted reference energies.

    Parameters
    ----------
    backend
        The foundation model.
    structures
        What to predict; labels are not looked at.
    weights
        Parameters in place of the base's, in the stored dtype; they are moved to the
        model's precision and device.
    shifts
        Element -> shift of the reference energy (eV), added in float64.
    properties
        Default: all the model has.
    graphs
        Graphs of the structures, where they exist already.
    batch_size
        Structures in one call of the model.
    advance
        Called with the number of structures done, for a progress bar.

    Returns
    -------
    list of dict
        Property -> float64 array in the shapes of `pathtune.properties`. Stress is
        left out for structures without a cell.
    """
    moved = moved_to(backend, weights or {})
    results: list[Prediction] = []
    for start in range(0, len(structures), batch_size):
        chunk = structures[start : start + batch_size]
        built = (
            graphs[start : start + batch_size]
            if graphs is not None
            else [backend.graph(s.atoms) for s in chunk]
        )
        results += predict_batch(
            backend, chunk, built, moved, properties or backend.properties
        )
        if advance is not None:
            advance(len(chunk))
    return with_shifts(structures, results, shifts or {})


def moved_to(backend: Backend, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in the precision and on the device of a model."""
    known = dict(backend.model.named_parameters())
    return {
        name: tensor.to(
            backend.device, known[name].dtype if name in known else backend.dtype
        )
        for name, tensor in weights.items()
    }


def predict_batch(
    backend: Backend,
    structures: Sequence[Structure],
    graphs: Sequence[Any],
    weights: Mapping[str, Tensor],
    properties: Collection[Property],
) -> list[Prediction]:
    """Predict structures in one call of the model, see `predict`; no shifts.

    Parameters
    ----------
    backend, structures, graphs, properties
        See `predict`.
    weights
        From `moved_to`.
    """
    output = backend.predict(backend.batch(graphs), weights, set(properties))
    return _split(structures, output)


def _split(
    chunk: Sequence[Structure], output: Mapping[Property, Tensor]
) -> list[Prediction]:
    """Cut a batch's output into structures, as float64 arrays."""
    arrays = {name: value.cpu().double().numpy() for name, value in output.items()}
    ends = np.cumsum([s.n_atoms for s in chunk])
    by_atom = {
        name: np.split(arrays[name], ends[:-1]) for name in BY_ATOM if name in arrays
    }
    results: list[Prediction] = []
    for index, structure in enumerate(chunk):
        predicted: dict[Property, np.ndarray] = {}
        if "energy" in arrays:
            predicted["energy"] = arrays["energy"][index]
        for name, pieces in by_atom.items():
            predicted[name] = pieces[index]
        if "stress" in arrays and structure.atoms.cell.rank == 3:
            predicted["stress"] = arrays["stress"][index]
        results.append(predicted)
    return results


def with_shifts(
    structures: Sequence[Structure],
    predictions: Sequence[Prediction],
    shifts: Mapping[str, float],
) -> list[Prediction]:
    """Return predictions whose energies have the shifts (eV) of their elements added.

    Elements without a shift keep the base's reference energy.
    """
    shifted = []
    for structure, predicted in zip(structures, predictions, strict=True):
        if "energy" in predicted:
            shift = sum(shifts.get(symbol, 0.0) for symbol in structure.atoms.symbols)
            predicted = {**predicted, "energy": predicted["energy"] + shift}
        shifted.append(predicted)
    return shifted


def unshifted(
    structures: Sequence[Structure], shifts: Mapping[str, float]
) -> list[str]:
    """Return the elements without a shift in structures that have an energy label."""
    table = survey(structures)
    labelled = table.take(np.flatnonzero(table.labelled["energy"]))
    return sorted(set(labelled.elements) - set(shifts))
