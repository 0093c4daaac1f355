"""Merging: base + delta as the vendor's own file, verified by the vendor's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from rich.console import Console
from torch import Tensor

from pathtune import files, trust
from pathtune.backends.base import Backend
from pathtune.deltafile import DeltaFile, fingerprint
from pathtune.errors import PathtuneError, UsageError
from pathtune.loading import load_with_delta
from pathtune.prediction import predict
from pathtune.properties import PROPERTIES, Structure


def merge(
    model: str | Backend,
    delta: str | Path | DeltaFile,
    output: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write base + delta in the vendor's own format, verified before it is left there.

    The merged file is loaded again by the vendor's code and compared with base + delta
    on sample structures; a mismatch leaves no file. A spin layer, which no vendor's
    file can hold, is written beside it as a delta of the merged model that adds the
    layer and changes nothing else: ``tuned.spin.safetensors`` beside ``tuned.pth``.

    Parameters
    ----------
    model, delta
        Base and delta, by name or path.
    output
        File to write.
    overwrite
        Replace an existing file.
    console
        Where the verification is printed.
    **options
        For `load`.

    Returns
    -------
    dict
        Largest differences ``energy_max_difference_ev_per_atom``,
        ``forces_max_difference_ev_per_angstrom``,
        ``stress_max_difference_ev_per_angstrom3``, and
        ``reference_energy_rounding_ev_per_atom``; with a spin layer ``spin_layer``, the
        file beside the output.

    Raises
    ------
    PathtuneError
        If the output exists, cannot be written, or the check fails.
    """
    output = Path(output)
    # The comparison is of roundings; a GPU's unordered sums would blur it.
    if isinstance(model, str):
        options.setdefault("device", "cpu")
    backend, loaded = load_with_delta(model, delta, **options)
    assert loaded is not None
    if not output.name.endswith(backend.suffixes):
        raise UsageError(
            f"{output}: {backend.name} files end in {' or '.join(backend.suffixes)}"
        )
    beside = _layer_path(output, backend) if loaded.layer else None
    for path in (output, *([beside] if beside else [])):
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; add --overwrite to replace it")
    weights = loaded.apply(backend.stored_weights())
    with files.replacing(output) as temporary:
        backend.save(temporary, weights, loaded.shifts)
        trust.remember(temporary)
        merged = backend.reload(temporary)
        result = _verify(backend, weights, loaded, merged)
        if beside is not None:
            _layer_file(loaded, merged, output.name).save(beside)
            result["spin_layer"] = str(beside)
    trust.remember(output)
    if console is not None:
        console.print(
            "verified: merged file = base + delta to "
            f"{result['energy_max_difference_ev_per_atom']:.1e} eV/atom, "
            f"{result['forces_max_difference_ev_per_angstrom']:.1e} eV/Å"
        )
        rounding = result["reference_energy_rounding_ev_per_atom"]
        line = f"reference energies are rounded by up to {rounding:.1e} eV/atom"
        console.print(f"warning: {line}" if rounding > 1e-4 else line)
        if beside is not None:
            console.print(
                f"note: the file format of {backend.name} has no place for the spin "
                f"layer, so the vendor's tools see a model without magnetism; the "
                f"layer is in {beside}. Both together: --model {output} --delta "
                f"{beside}",
                highlight=False,
            )
    return result


def _layer_path(output: Path, backend: Backend) -> Path:
    """Return where the spin layer of a merged model goes."""
    suffix = max((s for s in backend.suffixes if output.name.endswith(s)), key=len)
    return output.with_name(f"{output.name.removesuffix(suffix)}.spin.safetensors")


def _layer_file(loaded: DeltaFile, merged: Backend, name: str) -> DeltaFile:
    """Return the delta that puts the spin layer on a merged model."""
    kept = {k: v for k, v in loaded.metadata.items() if k not in ("tensors", "metrics")}
    metadata = kept | {"model": name, "base": fingerprint(merged.stored_weights())}
    return DeltaFile({}, {}, metadata, loaded.layer)


def _verify(
    backend: Backend,
    weights: Mapping[str, Tensor],
    delta: DeltaFile,
    merged: Backend,
) -> dict[str, Any]:
    """Compare a written checkpoint with base + delta on sample structures."""
    shifts = delta.shifts
    checked = samples(backend, sorted(shifts) or ["Cu"])
    if delta.layer:
        for seed, structure in enumerate(checked):
            moments = np.random.default_rng(seed).normal(size=(structure.n_atoms, 3))
            structure.atoms.set_initial_magnetic_moments(moments)
    ours = predict(backend, checked, weights=weights, shifts=shifts)
    theirs = predict(merged, checked, weights=delta.layer)
    worst = dict.fromkeys(PROPERTIES, 0.0)
    allowed_energy = 1e-5
    for structure, a, b in zip(checked, ours, theirs, strict=True):
        for name in worst:
            if name in a:
                scale = structure.n_atoms if name == "energy" else 1
                difference = float(abs(a[name] - b[name]).max()) / scale
                worst[name] = max(worst[name], difference)
        # The vendor sums in float32: four roundings of the total energy.
        rounding = 4 * abs(float(b["energy"])) * 2**-24 / structure.n_atoms
        allowed_energy = max(allowed_energy, 1e-5 + rounding)
    limits = dict.fromkeys(PROPERTIES, 1e-5) | {"energy": allowed_energy}
    for name, limit in limits.items():
        if not worst[name] <= limit:
            raise PathtuneError(
                f"the merged file does not reproduce base + delta: {name} differs by "
                f"{worst[name]:.1e} (allowed {limit:.1e}); nothing was written"
            )
    after = merged.reference_energies()
    before = backend.reference_energies()
    return {
        "energy_max_difference_ev_per_atom": worst["energy"],
        "forces_max_difference_ev_per_angstrom": worst["forces"],
        "stress_max_difference_ev_per_angstrom3": worst["stress"],
        "allowed_energy_difference_ev_per_atom": allowed_energy,
        "reference_energy_rounding_ev_per_atom": max(
            (abs(after[e] - before[e] - v) for e, v in shifts.items()), default=0.0
        ),
    }


def samples(backend: Backend, symbols: Sequence[str]) -> list[Structure]:
    """Return small rattled crystals and clusters of the delta's elements."""
    samples = []
    for index, symbol in enumerate(symbols):
        other = symbols[(index + 1) % len(symbols)]
        length = 3.2
        positions = [[0, 0, 0], [1.5, 1.7, 1.6], [0.1, 1.6, 1.4]]
        atoms = Atoms([symbol, other, symbol], positions)
        samples.append(Structure(atoms, source=f"{symbol}-{other} cluster"))
        periodic = atoms.copy()
        periodic.set_cell([length, length + 0.1, length + 0.2])
        periodic.pbc = True
        periodic.rattle(0.05, seed=index)
        samples.append(Structure(periodic, source=f"{symbol}-{other} crystal"))
    return samples
