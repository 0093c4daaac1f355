"""The settings of a run: frozen typed models, one YAML file, the command line's names.

Unknown keys are errors that name the nearest match. Values left out are filled in once
the data and the method are known; the run folder's ``config.yaml`` holds the result and
is its own fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pathtune.errors import UsageError, unknown
from pathtune.properties import Property
from pathtune.spin.config import SpinConfig

M = TypeVar("M", bound=BaseModel)

# MiB. The graphs of structures take ten to fifty times as much memory as their file.
STREAM_ABOVE = 64.0


class RunConfig(BaseModel):
    """Everything that defines a fine-tuning run.

    Parameters
    ----------
    model
        Name of a released model (``pathtune models``) or a checkpoint file.
    train, valid, test
        ASE-readable files. Without `valid`, `valid_fraction` of the training frames
        (seeded) is set aside.
    output
        Run folder.
    method, preset, method_options
        How the weights may move; options override the preset.
    select
        Which weights; see `pathtune.paths.select`.
    max_steps, max_epochs
        Length of the training; at most one of them.
    batch_size
        Structures in a step, on all devices together; clamp(N/10, 1, 64) by default.
    max_atoms_per_batch, max_edges_per_batch
        Bounds of what goes through the model at once, in atoms and in directed edges
        of the graphs; ``auto`` is the largest number of edges that fits in memory.
        With a `batch_size` a step adds up as many such batches as it takes; without
        one, a step is one of them.
    memory_limit
        Memory (GiB) that ``auto`` may take; all free memory of a GPU.
    tf32
        Multiply matrices in TF32 while training; NVIDIA GPUs only. Evaluations keep
        the full precision.
    stream_above
        Size of a data file (MiB) above which its structures stay in the file.
    compile
        Train with rewritten layers where the family has them: the same numbers up to
        rounding, proved at the start, in about half the time.
    workers
        Processes that read such structures and build their graphs.
    lr
        Learning rate of the method (each method has its own default).
    reference_energies
        estimated, foundation, isolated, average, or a JSON/YAML file.
    spin
        Settings of a spin layer, which gives a base without magnetism moments and an
        energy of the spins; None for no layer.
    magforces_scale
        What the labels of magnetic forces are multiplied with, or ``fit``: the factor
        that reconciles them with the energies of the training frames.
    energy_key, forces_key, stress_key, magmoms_key, magforces_key
        Keys of the labels, where they are not the usual ones.
    energy_weight, forces_weight, stress_weight, magmoms_weight, magforces_weight
        Weights of the loss terms. What has no label, or what the model does not
        predict, is not trained whatever its weight. Moments count as much as energies
        (in μ_B and eV/atom) and a tenth of the forces, as in CHGNet's own training.
        With a spin layer all weights are 1 unless given.
    huber_delta
        Width of the Huber loss (eV/atom, eV/Å, eV/Å^3, μ_B, eV/μ_B).
    clip_grad_norm
        Largest norm of the gradient of a step.
    averaging_power
        r: step t has weight t^r in the average that is handed out; 0 is the plain
        average of the schedule-free optimizer as published.
    warmup_fraction
        Share of the steps in which the learning rate rises from zero.
    eval_every
        Steps between evaluations on the validation frames and checkpoints.
    replay, replay_file, replay_weight
        Structures labelled by the base model that every step learns from as well, so
        that the model forgets less: so many generated crystals of the base's elements,
        or, with a file, so many of its frames (all by default); and the weight of
        their loss.
    retention
        Structures on which a finished run measures what it has forgotten: none, fast
        (40), large (400).
    patience
        Stop after this many evaluations without improvement; None never stops.
    loggers
        Extra loggers: tensorboard, wandb.
    level_of_theory
        Written into the delta file, e.g. ``r2SCAN/def2-TZVP``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    train: str
    valid: str | None = None
    test: str | None = None
    output: str = "pathtune-run"
    method: str = "sparse"
    preset: str | None = None
    method_options: dict[str, Any] = Field(default_factory=dict)
    select: str | None = None
    max_steps: int | None = Field(None, ge=1)
    max_epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    max_atoms_per_batch: int | None = Field(None, ge=1)
    max_edges_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    memory_limit: float | None = Field(None, gt=0)
    tf32: bool = False
    stream_above: float = Field(STREAM_ABOVE, ge=0)
    compile: bool = True
    workers: int | None = Field(None, ge=0)
    lr: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    head: str | None = None
    reference_energies: str = "estimated"
    spin: SpinConfig | None = None
    magforces_scale: Annotated[float, Field(gt=0)] | Literal["fit"] = 1.0
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    magmoms_key: str | None = None
    magforces_key: str | None = None
    energy_weight: float = Field(1.0, ge=0)
    forces_weight: float = Field(10.0, ge=0)
    stress_weight: float = Field(10.0, ge=0)
    magmoms_weight: float = Field(1.0, ge=0)
    magforces_weight: float = Field(1.0, ge=0)
    huber_delta: float = Field(0.01, gt=0)
    clip_grad_norm: float = Field(10.0, gt=0)
    averaging_power: float = Field(4.0, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    eval_every: int | None = Field(None, ge=1)
    replay: int | None = Field(None, ge=1)
    replay_file: str | None = None
    replay_weight: float = Field(1.0, gt=0)
    retention: Literal["none", "fast", "large"] = "fast"
    patience: int | None = Field(None, ge=1)
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    level_of_theory: str | None = None
    trust_checkpoint: bool = False

    @model_validator(mode="before")
    @classmethod
    def _equal_weights(cls, settings: Any) -> Any:
        """Weigh all terms alike by default where there is a spin layer."""
        if isinstance(settings, Mapping) and settings.get("spin") is not None:
            return {"forces_weight": 1.0, "stress_weight": 1.0, **settings}
        return settings

    @property
    def is_bounded(self) -> bool:
        """Whether atoms or edges bound what goes through the model at once."""
        return (self.max_atoms_per_batch, self.max_edges_per_batch) != (None, None)

    @property
    def label_keys(self) -> dict[Property, str]:
        """The label keys the user named."""
        keys: dict[Property, str | None] = {
            "energy": self.energy_key,
            "forces": self.forces_key,
            "stress": self.stress_key,
            "magmoms": self.magmoms_key,
            "magforces": self.magforces_key,
        }
        return {name: key for name, key in keys.items() if key is not None}

    @property
    def loss_weights(self) -> dict[Property, float]:
        """Weight of each loss term."""
        return {
            "energy": self.energy_weight,
            "forces": self.forces_weight,
            "stress": self.stress_weight,
            "magmoms": self.magmoms_weight,
            "magforces": self.magforces_weight,
        }

    def to_yaml(self) -> str:
        """Return the settings as YAML, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises
    ------
    UsageError
        If the file is missing or is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).splitlines()[0]
        raise UsageError(f"{path} is not YAML: {line}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no settings (a YAML mapping is expected)")
    return content


def assign(settings: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=c`` to nested settings; c is read as YAML.

    Raises
    ------
    UsageError
        If there is no ``=``, a part of the path is no mapping, or the value no YAML.
    """
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {assignment!r}: write key=value, e.g. seed=1")
    *parents, last = key.split(".")
    target = settings
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UsageError(f"--set {assignment!r}: {parent} has no parts")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(
            f"--set {assignment!r}: {value!r} is not YAML; quote it"
        ) from error


def validate(model: type[M], settings: Mapping[str, Any], what: str) -> M:
    """Build a settings object; turn pydantic's complaints into one sentence.

    Raises
    ------
    UsageError
        Naming the setting, what was given, and the nearest match.
    """
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                problems.append(unknown(what, key, _known(model, problem["loc"])))
            elif problem["type"] == "missing":
                problems.append(f"{what} {key!r} is required")
            else:
                given = problem["input"]
                problems.append(f"{what} {key!r} = {given!r}: {problem['msg']}")
        raise UsageError("; ".join(problems)) from error


def _known(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Return the settings that exist where an unknown one was given."""
    prefix = ""
    for part in place[:-1]:
        kinds = get_args(model.model_fields[str(part)].annotation)
        model = next(k for k in kinds if issubclass(k, BaseModel))
        prefix += f"{part}."
    return [prefix + name for name in model.model_fields]
