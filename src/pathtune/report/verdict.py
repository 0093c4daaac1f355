"""The verdict: four questions about a run, answered from its results by stated bounds.

Nothing here is a matter of taste at run time: every answer names the numbers it rests
on and the bounds they are held against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pathtune.report import groups
from pathtune.report.run import QUANTITIES, Run, mae

Level = Literal["good", "caution", "bad", "unknown"]

#: Tuned error over the base's, below which a property is better and above which worse.
BETTER, WORSE = 0.8, 1.02
#: Force drift on other crystals over the size of the forces there.
LITTLE, MUCH = 0.1, 0.3
#: meV/atom/ps that the total energy may drift in the short simulation.
LARGEST_DRIFT = 20.0
#: Frames below which errors are called a rough estimate.
FEW_FRAMES = 20
#: Values (force components, energies, ...) from which a group of them is judged.
FEW_VALUES = 30
MOST_NAMED = 6


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Parameters
    ----------
    question, answer
        In words.
    level
        What it means for the use of the model.
    reasons
        Measured numbers and the bounds they are held against.
    """

    question: str
    answer: str
    level: Level
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """All answers, and what follows from them in one sentence."""

    sentence: str
    level: Level
    answers: tuple[Answer, ...]


def judge(run: Run) -> Verdict:
    """Judge a run."""
    answers = (better(run), amount(run), forgotten(run), safe(run))
    accuracy, _, memory, safety = answers
    where = "structures like the training data"
    level: Level
    if accuracy.level == "unknown":
        level, sentence = "caution", "No label says whether it is better."
    elif accuracy.level == "bad":
        level, sentence = "bad", "No better than the foundation model: do not use it."
    elif safety.level == "bad":
        level = "bad"
        sentence = "More accurate, but not safe to simulate with."
    elif accuracy.level == "caution":
        level = "caution"
        sentence = f"Better {accuracy.answer[0].lower()}{accuracy.answer[1:]}"
    elif memory.level == "bad":
        level = "caution"
        sentence = f"Better, and much was forgotten: use it on {where} only."
    elif safety.level == "caution":
        level, sentence = "caution", f"Better, with a reservation: {safety.answer}"
    elif "unknown" in (memory.level, safety.level):
        level = "caution"
        sentence = (
            "Better; what was forgotten, and whether it is safe, was not measured."
        )
    else:
        level, sentence = "good", f"Better, and safe to use on {where}."
    return Verdict(sentence, level, answers)


def ratios(run: Run) -> dict[str, float]:
    """Return the tuned over the base's error of every property; title -> ratio.

    The base has re-estimated reference energies, so an offset is no gain.
    """
    found = {}
    for name in run.telling:
        before, after = mae(run.before, name), mae(run.after, name)
        if before > 0 and np.isfinite(after):
            found[QUANTITIES[name].title] = after / before
    return found


def better(run: Run) -> Answer:
    """Say whether it is better than the foundation model."""
    question = "Better than the foundation model?"
    found = ratios(run)
    if not found:
        return Answer(
            question,
            "Cannot be said.",
            "unknown",
            ("No frame has a label to compare.",),
        )
    gained = [title for title, ratio in found.items() if ratio <= BETTER]
    lost = [title for title, ratio in found.items() if ratio > WORSE]
    level: Level = "good"
    answer = "Yes."
    if not gained:
        level, answer = "bad", "No."
    elif lost:
        level, answer = (
            "caution",
            f"In part: {_listing(gained)} yes, {_listing(lost)} no.",
        )
    elif len(gained) < len(found):
        same = [title for title in found if title not in gained]
        answer = f"Yes; {_listing(same)} about the same."
    n = run.after["n_structures"]
    reasons = [
        f"Judged on {n} {run.judged} frames. Better means an error at most {BETTER:g} "
        f"times that of the foundation model with re-estimated reference energies; "
        f"worse, more than {WORSE:g} times."
    ]
    if worse := losers(run):
        more = ", ..." if len(worse) > MOST_NAMED else ""
        named = "; ".join([*worse.values()][:MOST_NAMED]) + more
        reasons.append(f"Worse than the foundation model: {named}.")
        if level == "good":
            level = "caution"
            answer = f"In part: not for {_listing([*worse][:MOST_NAMED])}{more}."
    if run.judged == "valid":
        reasons.append(
            "There were no test frames: the validation frames also chose the step that "
            "was kept, so the errors are somewhat optimistic."
        )
    if n < FEW_FRAMES:
        reasons.append(f"Fewer than {FEW_FRAMES} frames: a rough estimate.")
    if run.results["steps"] and run.results["best_step"] == 0:
        reasons.append("No evaluation was better than the start of the training.")
    elif run.results["steps"] and run.results["best_step"] == run.results["steps"]:
        reasons.append("The last step was the best: longer training may help.")
    return Answer(question, answer, level, tuple(reasons))


def losers(run: Run) -> dict[str, str]:
    """Return the elements and configuration types whose errors grew, with the errors.

    Those with fewer than `FEW_VALUES` values are left out.
    """
    found: dict[str, list[str]] = {}
    for by in (groups.by_element(run), groups.by_config_type(run)):
        for name in run.telling:
            quantity, column = QUANTITIES[name], by.get(name, {})
            for group, (n, before, after) in column.items():
                # Zero before: what symmetry or a missing moment makes zero.
                grew = after > WORSE * before > 0
                if len(column) > 1 and n >= FEW_VALUES and grew:
                    text = f"{before:.3g} → {after:.3g} {quantity.unit}, {n} values"
                    found.setdefault(group, []).append(f"{quantity.title} {text}")
    return {group: f"{group} ({', '.join(texts)})" for group, texts in found.items()}


def amount(run: Run) -> Answer:
    """Say by how much it is better."""
    question = "By how much?"
    found = ratios(run)
    reasons = []
    for name in run.telling:
        quantity = QUANTITIES[name]
        before, after = mae(run.before, name), mae(run.after, name)
        if quantity.title in found:
            reasons.append(
                f"{quantity.title}: {before:.3g} → {after:.3g} {quantity.unit} (MAE)."
            )
    if not found:
        return Answer(question, "Cannot be said.", "unknown", ("No labels.",))
    parts = [f"{title} {_times(ratio)}" for title, ratio in found.items()]
    return Answer(question, f"{', '.join(parts)}.", better(run).level, tuple(reasons))


def _times(ratio: float) -> str:
    if ratio == 0:
        return "exact"
    factor = 1 / ratio
    return f"{factor:.1f}×" if factor < 9.95 else f"{factor:.0f}×"


def forgotten(run: Run) -> Answer:
    """Say what it has forgotten."""
    question = "What did it forget?"
    retention = run.results.get("retention")
    size = (retention or {}).get("forces_base_mev_per_angstrom")
    if not retention or not size:
        return Answer(
            question,
            "Not measured.",
            "unknown",
            ("The run was made with retention none, or no structure could be judged.",),
        )
    share = retention["forces_drift_mev_per_angstrom"] / size
    level: Level = "good" if share < LITTLE else "bad" if share > MUCH else "caution"
    words = {"good": "Little", "caution": "Something", "bad": "Much"}[level]
    return Answer(
        question,
        f"{words}: forces elsewhere moved by {100 * share:.0f} %.",
        level,
        (
            f"On {retention['n_structures']} crystals outside the data the force "
            f"components moved by {retention['forces_drift_mev_per_angstrom']:.1f} "
            f"meV/Å, their mean size is {size:.0f}; energies by "
            f"{retention['energy_drift_mev_per_atom']:.1f} meV/atom.",
            f"Below {100 * LITTLE:.0f} % is little, above {100 * MUCH:.0f} % much.",
        ),
    )


def safe(run: Run) -> Answer:
    """Say whether it is safe to simulate with."""
    question = "Safe to use?"
    retention = run.results.get("retention")
    if not retention:
        return Answer(
            question, "Not measured.", "unknown", ("The run has retention none.",)
        )
    dimers, nve = retention["dimers"], retention["nve"]
    problems: list[str] = []
    cautions: list[str] = []
    reasons = []
    new = dimers["new_holes"]
    if new:
        problems.append(f"holes at short range in {_listing(new[:6])}")
    elif dimers["hole_fraction"]:
        cautions.append("the foundation model's own holes at short range remain")
    n = dimers["n_pairs"]
    after, before = (
        round(n * (1 - dimers[key])) for key in ("hole_fraction", "base_hole_fraction")
    )
    reasons.append(
        f"In {after} of {n} pairs of elements two atoms pushed together repel each "
        f"other (foundation model: {before} of {n})."
    )
    if nve is None:
        cautions.append("no frame to start a simulation from")
    elif nve["exploded"]:
        problems.append(f"a simulation exploded at step {nve['n_steps']}")
    else:
        drift = nve["energy_drift_mev_per_atom_per_ps"]
        if abs(drift) > LARGEST_DRIFT:
            cautions.append("the energy of a simulation drifts")
        reasons.append(
            f"{nve['n_steps']} steps of {nve['time_step_fs']:g} fs at constant energy "
            f"from 300 K: the energy drifts by {drift:.2g} meV/atom/ps (bound: "
            f"{LARGEST_DRIFT:g}). A short look, not a proof for long or hot runs."
        )
    level: Level = "good"
    answer = "No sign of trouble."
    if problems:
        level, answer = "bad", f"No: {'; '.join(problems)}."
    elif cautions:
        level, answer = "caution", f"With care: {'; '.join(cautions)}."
    return Answer(question, answer, level, tuple(reasons))


def _listing(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
