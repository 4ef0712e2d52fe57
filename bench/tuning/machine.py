"""Runs candidates on a device: right results first, against float64, then time from a cold L2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from sk_triton.tuning.entries import Choice
from sk_triton.workload import Workload

from ..measuring import protocol
from .subjects import InferenceSubject, Subject, TrainingSubject
from .targets import Settled, Target

BUDGET = protocol.Budget(warmup_seconds=0.2, seconds=0.4, min_rounds=15, max_rounds=200)
"""For all candidates of a launch together."""


class Device:
    """A device, as :class:`.flow.Machine`. One unit's tensors are on it at a time, and one target's launches."""

    def __init__(self, device: torch.device, budget: protocol.Budget = BUDGET, seed: int = 0) -> None:
        self.device, self.budget, self.seed = device, budget, seed
        self.timer = protocol.timer_for(device)
        self._subject: Subject | None = None
        self._of: tuple[Workload, bool] | None = None
        self._target: Target | None = None
        self._settled: Settled = {}
        self._calls: dict[Choice, Callable[[], object]] = {}

    def now(self) -> float:
        return self.timer.now()

    def begin(self, target: Target, settled: Settled) -> None:
        self._calls = {}
        self._target, self._settled = target, dict(settled)
        if self._of != (target.workload, target.is_training):
            self._subject, self._of = None, None  # frees its tensors before the next one's are made
            kind = TrainingSubject if target.is_training else InferenceSubject
            self._subject = kind(target.workload, self.device, self.seed)
            self._of = target.workload, target.is_training

    def wrong(self, choice: Choice) -> str:
        assert self._target is not None
        assert self._subject is not None
        steps, fault = self._subject.run(self._target.plan(choice, self._settled))
        if not fault:
            own = self._target.steps(steps)
            self._calls[choice] = own[0] if len(own) == 1 else lambda: [step() for step in own]
        return fault

    def times(self, choices: Iterable[Choice]) -> Mapping[Choice, float | str]:
        chosen = list(choices)
        contestants = {str(i): protocol.Contestant(self._calls[c]) for i, c in enumerate(chosen)}
        measured = protocol.Measurement()
        try:
            protocol.measure(contestants, self.timer, self.budget, measured)
        except RuntimeError as error:  # a device that has failed refuses even to be waited for
            if not self.trouble():
                raise
            return {choice: str(error).strip().splitlines()[0] for choice in chosen}
        found: dict[Choice, float | str] = {}
        for i, choice in enumerate(chosen):
            timing = measured.timing(str(i))
            found[choice] = measured.failures[str(i)][1] if timing is None else timing.median_ms / 1e3
        return found

    def trouble(self) -> str:
        return protocol.device_trouble(self.device)
