"""What "auto" runs of a problem's schedules, and why none of the others, in the dispatcher's words."""

from __future__ import annotations

from sk_triton import planning, preference
from sk_triton.backend import SCHEDULES
from sk_triton.chips import Chip

from ..formats import microseconds
from .speed_of_light import Prediction, Problem


def choice(problem: Problem, predictions: list[Prediction], chip: Chip) -> tuple[str, str]:
    """(what "auto" runs, why): the dispatcher's own choice, beside the predictions."""
    chosen = preference.fastest_plan(problem.on(chip)).schedule
    by_name = {prediction.schedule: prediction for prediction in predictions}
    others = ", ".join(f"{name} {microseconds(p.total)}" for name, p in by_name.items() if name != chosen)
    return (
        chosen,
        f"predicted {microseconds(by_name[chosen].total)} µs, bound by {by_name[chosen].bound}; {others}",
    )


def rejected(problem: Problem, predictions: list[Prediction], chip: Chip) -> dict[str, str]:
    """Why "auto" runs no other of the predicted schedules, in the dispatcher's words."""
    words = dict(preference.fastest_plan(problem.on(chip)).rejected)
    return {p.schedule: words[p.schedule] for p in predictions if p.schedule in words}


def refused(problem: Problem, chip: Chip) -> dict[str, str]:
    """Why a schedule cannot run the problem, for those that cannot."""
    reasons = {name: planning.refusal(name, problem.on(chip)) for name in SCHEDULES}
    return {name: reason for name, reason in reasons.items() if reason}
