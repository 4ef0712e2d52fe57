"""What can be tuned about a unit: each launch of each schedule, then the schedule; and what is predicted of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sk_triton import planning, preference
from sk_triton.backend import Schedule
from sk_triton.kernels.launch import Launch
from sk_triton.plan import Plan
from sk_triton.save import Save
from sk_triton.training.plan import make_training_plan
from sk_triton.tuning import launches
from sk_triton.tuning.entries import Choice, Entry, Trial
from sk_triton.tuning.keys import INFERENCE, KINDS, SCHEDULE, TRAINING
from sk_triton.tuning.lookup import Request, analytic_only, experiment
from sk_triton.workload import Workload

from ..compiled.planned import meta_steps
from ..compiled.training_steps import meta_launches
from ..model.gpus import Gpu
from ..problems import in_one_line
from .shortlist import shortlist

TRAIN: Literal["train"] = "train"
SAVE: Save = "branches"
"""Under the other policy the same launches run again, and those of inference."""

Settled = Mapping[str, Choice]
"""By key, what was found for the launches that come before."""


@dataclass(frozen=True)
class Target:
    """One thing to tune.

    Attributes:
        unit: the title of the unit that it belongs to; workload: that unit on its batch.
        kind, key: as `sk_triton.tuning.keys`.
        schedule: what the launch is part of; the expected one, where the schedule itself is to be chosen; `TRAIN`.
        occurrence: which of the schedule's launches of this kind it is, from 0, unless all of them share the config.
        choices: the analytic choice, then other candidates; space: all that may be used.
    """

    unit: str
    workload: Workload
    kind: str
    key: str
    schedule: Schedule | Literal["train"]
    occurrence: int
    choices: tuple[Choice, ...]
    space: frozenset[Choice]

    def takes(self, entry: Entry) -> bool:
        """Whether an entry, which may come from anywhere, is one of this target."""
        if entry.choice is None:
            return bool(entry.failure) or not self.is_schedule
        return entry.choice in self.space

    @property
    def is_schedule(self) -> bool:
        return self.kind == SCHEDULE

    @property
    def is_training(self) -> bool:
        return self.schedule == TRAIN

    def plan(self, choice: Choice, settled: Settled) -> Plan:
        """The unit's plan with a candidate in place."""
        if self.is_training:
            with experiment({**settled, self.key: choice}):
                return make_training_plan(self.workload, SAVE)
        with experiment(settled if self.is_schedule else {**settled, self.key: choice}):
            return planning.make_plan(choice if self.is_schedule else self.schedule, self.workload)  # type: ignore[arg-type]

    def steps(self, planned: Sequence[Any]) -> list[Any]:
        """Those of a plan's steps that the target is about."""
        if self.is_schedule:
            return list(planned)
        kind = KINDS[self.kind]
        matching = [
            step
            for step in planned
            if isinstance(step, Launch)
            and step.kernel.fn.__name__.startswith(tuple(f"{name}_" for name in kind.kernels))
            # Kernels that only store have no TASK.
            and (not kind.task or step.constexprs.get("TASK", "store") == kind.task)
        ]
        return matching if kind.is_shared else [matching[self.occurrence]]


def refusal(workload: Workload, direction: str) -> str:
    """Why a unit is not tuned in a direction, "" if it is."""
    if direction == TRAINING and workload.n == 1 and workload.spec.gate_norm:
        return "training takes a batch of two samples, for the statistics of the gate's norm"
    return ""


def targets_of(unit: str, workload: Workload, limit: int, direction: str = INFERENCE) -> list[Target]:
    """The targets of a unit in a direction, at most `limit` choices each; none under a :func:`refusal`."""
    if refusal(workload, direction):
        return []
    return (_of_training if direction == TRAINING else _of_inference)(unit, workload, limit)


def _of_inference(unit: str, workload: Workload, limit: int) -> list[Target]:
    """Every launch of every schedule, then the schedule."""
    with analytic_only():
        schedules = planning.possible_schedules(workload)
    expected = preference.expected_schedule(workload)
    found: dict[str, Target] = {}
    # What schedules have in common is of the one that is expected to be taken.
    for schedule in sorted(schedules, key=lambda name: name != expected):
        with experiment() as requests:
            planning.make_plan(schedule, workload)
        for target in _of_launches(unit, workload, limit, schedule, requests):
            found.setdefault(target.key, target)
    if len(schedules) > 1:
        others = tuple(name for name in schedules if name != expected)
        key, choices = launches.schedule_key(workload), (expected, *others)
        found[key] = Target(unit, workload, SCHEDULE, key, expected, 0, choices, frozenset(choices))
    return list(found.values())


def _of_training(unit: str, workload: Workload, limit: int) -> list[Target]:
    """The launches of a training step, those that inference has as well included; there is one schedule."""
    with experiment() as requests:
        plan = make_training_plan(workload, SAVE)
    # What it was planned from may ask for more than its launches take.
    used = {source.key for source in plan.sources}
    own = {request.key: request for request in requests if request.key in used}
    return _of_launches(unit, workload, limit, TRAIN, list(own.values()))


def _of_launches(
    unit: str, workload: Workload, limit: int, schedule: Any, requests: Sequence[Request]
) -> list[Target]:
    found = []
    seen: Counter[str] = Counter()
    for request in requests:
        candidates = list(request.candidates())
        choices = tuple(shortlist(candidates, request.analytic(), request.cost, limit))
        found.append(
            Target(
                unit,
                workload,
                request.kind,
                request.key,
                schedule,
                seen[request.kind],
                choices,
                frozenset(candidates),
            )
        )
        seen[request.kind] += 1
    return found


def assess(target: Target, choice: Choice, settled: Settled, gpu: Gpu) -> Trial:
    """Compiles a candidate for a GPU that need not be present: its predicted time, or why it is out.

    For a process in which kernels are compiled, not interpreted.
    """
    from ..model import speed_of_light as sol

    try:
        steps = target.steps(_steps_on_meta(target, choice, settled))
        for step in steps:
            excesses = sol.compiled(step, gpu.chip).excesses if isinstance(step, Launch) else []
            if excesses:
                return Trial(choice, None, None, ", ".join(excesses))
        predicted = sum(step.total for step in sol.predict_steps(steps, gpu))
    except Exception as error:  # whatever the compiler raises
        return Trial(choice, None, None, in_one_line(error)[:200])
    return Trial(choice, predicted, None)


def least_seconds(target: Target, gpu: Gpu) -> list[float]:
    """For each choice of a target, a time that it cannot beat on a GPU, from its bytes alone: nothing is compiled.

    0 where the choice cannot even be planned: :func:`assess` says why.
    """
    from ..model import speed_of_light as sol

    found = []
    for choice in target.choices:
        try:
            steps = target.steps(_steps_on_meta(target, choice, {}))
            found.append(sum(step.total for step in sol.least_steps(steps, gpu)))
        except Exception:  # as in `assess`
            found.append(0.0)
    return found


def _steps_on_meta(target: Target, choice: Choice, settled: Settled) -> list[Any]:
    plan = target.plan(choice, settled)
    if target.is_training:
        return meta_launches(target.workload, plan, SAVE)
    return meta_steps(plan, target.workload)[0]
