"""The model card of a delta: ``README.md`` as Hugging Face reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pathtune import discovery
from pathtune.deltafile import DeltaFile
from pathtune.loading import models

CARD = "README.md"
#: Licences that the hub knows by their SPDX identifier in small letters.
_KNOWN = frozenset({"mit", "apache-2.0", "bsd-3-clause", "gpl-3.0", "cc-by-4.0"})
_UNITS = {
    "mev_per_atom": "meV/atom",
    "mev_per_angstrom": "meV/Å",
    "mev_per_angstrom3": "meV/Å^3",
    "mu_b": "μ_B",
    "mev_per_mu_b": "meV/μ_B",
    "degrees": "°",
}


def render(
    delta: DeltaFile,
    *,
    name: str,
    results: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> str:
    """Return the model card of a delta.

    Parameters
    ----------
    delta
        What is described; what its run measured is in its metadata.
    name
        Title.
    results
        Content of ``metrics.json``, which has more: labels, retention.
    command
        The command line of the run.

    Returns
    -------
    str
        Markdown with a YAML header. What is not known is left out.

    References
    ----------
    https://huggingface.co/docs/hub/model-cards
    """
    metadata = delta.metadata
    results = results or {
        "sparsity": metadata.get("sparsity"),
        **metadata.get("metrics", {}),
    }
    base = str(metadata.get("model"))
    backend = str(metadata.get("backend"))
    errors = _errors(results)
    part = "test" if results.get("test") else "valid"
    elements = list(metadata.get("elements", []))
    licence = str(metadata.get("licence", "that of the foundation model"))
    data = metadata.get("data", {})
    labels = results.get("data", {}).get("train", {}).get("labels", {})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template("modelcard.md.jinja").render(
        header=_header(name, base, backend, elements, licence, errors, part),
        name=name,
        base=base,
        backend=backend,
        head=metadata.get("head"),
        elements=", ".join(elements) or "no element that is recorded",
        level=metadata.get("level_of_theory"),
        n_updated=delta.updated_parameters,
        with_layer=bool(metadata.get("spin")),
        errors=errors,
        judged="the test frames" if part == "test" else "the validation frames",
        is_test=part == "test",
        n_judged=(results.get(part) or {}).get("n_structures"),
        n_train=data.get("n_train"),
        n_replay=data.get("n_replay"),
        fingerprint=data.get("train"),
        labels=", ".join(f"{n} {label}" for label, n in labels.items()),
        shifts=", ".join(f"{e} {v:+.4f}" for e, v in delta.shifts.items()),
        method=metadata.get("method", {}).get("name", "a combination of other deltas"),
        select=metadata.get("select"),
        seed=metadata.get("seed"),
        sparsity=results.get("sparsity"),
        retention=_measured(results.get("retention")),
        is_released=base in {info.name for info in models()},
        suffix=_suffix(backend),
        versions=metadata.get("versions", {}),
        command=command,
        licence=licence,
    )


def _errors(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the mean absolute errors before and after, as people read them."""
    before = results.get("zero_shot") or {}
    after = results.get("test") or results.get("valid") or {}
    found = []
    for key, value in after.items():
        label, is_mean, unit = key.partition("_mae_")
        if is_mean and key in before:
            digits = 3 if unit == "mu_b" else 2
            found.append(
                {
                    "key": key,
                    "label": label,
                    "before": f"{before[key]:.{digits}f}",
                    "after": f"{value:.{digits}f}",
                    "unit": _UNITS[unit],
                }
            )
    return found


def _measured(retention: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return what a run has forgotten; None where nothing could be compared."""
    if not retention or "forces_drift_mev_per_angstrom" not in retention:
        return None
    return retention


def _header(
    name: str,
    base: str,
    backend: str,
    elements: list[str],
    licence: str,
    errors: list[dict[str, str]],
    part: str,
) -> str:
    """Return the metadata of the card as YAML."""
    if licence.lower() in _KNOWN:
        header: dict[str, Any] = {"license": licence.lower()}
    else:
        header = {"license": "other", "license_name": "-".join(licence.lower().split())}
    header |= {
        "library_name": "pathtune",
        "base_model": base,
        "tags": ["interatomic-potential", "fine-tuning", backend, *elements],
    }
    if errors:
        metrics = [
            {
                "type": "mae",
                "name": f"{e['label']} MAE ({e['unit']})",
                "value": float(e["after"]),
            }
            for e in errors
        ]
        header["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "other", "name": "interatomic potential"},
                        "dataset": {"type": "other", "name": f"own {part} structures"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True))


def _suffix(backend: str) -> str:
    """Return the suffix of a family's checkpoints, or nothing for an unknown one."""
    if backend not in discovery.names("backends"):
        return ""
    return str(discovery.load("backends", backend).Backend.suffixes[0])
