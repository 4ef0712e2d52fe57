"""One case: every provider built, checked, weighed and timed, each failure kept to the provider it belongs to."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sk_triton.environment import MissingPackageError

from .. import results
from ..shapes import TRAINING, Case
from . import inputs, memory, protocol
from .entrant import Entrant, Outcome, arrange
from .forms import Call
from .judge import Judge
from .protocol import Contestant
from .providers import Provider, State, make_state
from .sources import yardstick

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIMED_INPUT = inputs.RANDOM
CHECKED_INPUTS = (inputs.PHOTO, TIMED_INPUT)
"""The last one is timed: by the very calls that were checked, where float64 fits for the whole batch."""
CHECKING_SHARE = 0.5
"""Share of a case's progress that stands for building and checking; the rest is timing."""

MIN_CHECK_BATCH = 2
"""Batch norm needs two samples to train."""

FLOOR_KEY = "copy/"


@dataclass(frozen=True)
class Setting:
    """What all the cases of a run share. `competitors` chooses the providers of a case."""

    device: torch.device
    seed: int
    competitors: Callable[[Case], Sequence[Provider]]
    timer: protocol.Timer
    budget: protocol.Budget = field(default_factory=protocol.Budget)
    on_round: Callable[[], object] = lambda: None


def run_case(
    case: Case,
    setting: Setting,
    records: list[results.Record],
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Checks and times every provider of a case and appends one record each, even if interrupted.

    A failing provider is recorded and the others go on; KeyboardInterrupt is passed on after the
    records are written.
    """
    competition = _Competition(case, setting, on_progress)
    try:
        competition.run()
    except Exception as error:  # the oracle or the input failed: nobody can be judged
        competition.fail_rest(error)
    finally:
        records.extend(competition.records())
        has_compiled = any(provider.form.is_compiled for provider in competition.providers)
        del competition
        _release(setting.device, has_compiled)


class _Competition:
    """The course of one case."""

    def __init__(self, case: Case, setting: Setting, on_progress: Callable[[float], None]) -> None:
        self.case, self.setting, self.on_progress = case, setting, on_progress
        self.dtype = DTYPES[case.dtype]
        self.providers = list(setting.competitors(case))
        self.found = {provider.key: provider.record(case) for provider in self.providers}
        self.entrants: dict[str, Entrant] = {}
        self.measured = protocol.Measurement()

    def run(self) -> None:
        missing = yardstick(self.case.subject).missing()
        if missing:
            raise MissingPackageError(missing)
        state = _rounded(make_state(self.case, self.setting.seed), self.dtype)
        self._build(state)
        contestants: dict[str, Contestant] = {}
        for index, kind in enumerate(CHECKED_INPUTS):
            contestants.clear()  # graphs hold memory
            x, dv, judge = self._judge(kind, state)
            contestants = self._check(judge, x, dv, index)
            del judge
        if x.shape[0] != self.case.batch:
            contestants.clear()
            x, dv = self._input(TIMED_INPUT, self.case.batch)
            contestants = self._bind(x, dv)
        self._weigh(contestants)
        if contestants and not self.case.is_network:
            contestants[FLOOR_KEY] = Contestant(_floor(x, self.case))
        protocol.measure(
            contestants,
            self.setting.timer,
            self.setting.budget,
            self.measured,
            lambda fraction: self.on_progress(CHECKING_SHARE + (1 - CHECKING_SHARE) * fraction),
            self.setting.on_round,
        )

    def fail_rest(self, error: Exception) -> None:
        """Records an error that befell all the providers that are still without a verdict."""
        status, message = protocol.failure(error)
        for key, record in self.found.items():
            if record.status == results.NOT_MEASURED and not self.measured.samples.get(key):
                self.found[key] = replace(record, status=status, message=message)

    def records(self) -> list[results.Record]:
        """What is known by now."""
        finished = []
        for key, record in self.found.items():
            timing = self.measured.timing(key)
            if key in self.measured.failures:
                status, message = self.measured.failures[key]
                record = replace(record, status=status, message=message)
            elif timing:
                warm = self.measured.timing(key, protocol.WARM)
                host = self.measured.timing(key, protocol.HOST)
                record = replace(record, status=results.OK, message=None, timing=timing, warm=warm)
                record = record.with_host_time(host) if host else record
            finished.append(record)
        floor = self.measured.timing(FLOOR_KEY)
        if floor:
            finished.append(
                results.Record(
                    self.case,
                    source="copy",
                    source_label=f"memory floor: {self.case.floor_passes:g} passes",
                    form="",
                    form_label="",
                    role=results.FLOOR,
                    status=results.OK,
                    timing=floor,
                    warm=self.measured.timing(FLOOR_KEY, protocol.WARM),
                )
            )
        return finished

    def _build(self, state: State) -> None:
        """The providers that can run here become entrants; why the others cannot goes to `found`."""
        for provider in self.providers:
            missing = provider.source.missing()
            if missing:
                self._settle(provider.key, results.SKIPPED, missing)
                continue
            try:
                with provider.scope():
                    module = provider.module(self.case, state, self.dtype, self.setting.device)
                    self.entrants[provider.key] = Entrant(self.case, provider, module)
            except Exception as error:
                self._settle(provider.key, *protocol.failure(error))

    def _judge(self, kind: str, state: State) -> tuple[Tensor, Tensor | None, Judge]:
        """An input, the output's gradient and who judges them: of half the batch, and half of that, where float64 does
        not fit."""
        batch = self.case.batch
        while True:
            x, dv = self._input(kind, batch)
            try:
                return x, dv, Judge(self.case, state, kind, x, dv, self.dtype)
            except (RuntimeError, MemoryError) as error:
                if not protocol.is_out_of_memory(error) or batch <= MIN_CHECK_BATCH:
                    raise
            batch //= 2
            _release(self.setting.device, has_compiled=False)

    def _check(self, judge: Judge, x: Tensor, dv: Tensor | None, index: int) -> dict[str, Contestant]:
        """Judges everyone on one input; the calls of those who passed."""
        arranged = _Arranged(x, dv)
        contestants = {}
        for done, provider in enumerate(self.providers):
            if provider.key in self.entrants:
                call = self._check_one(provider, judge, *arranged.of(provider))
                if call is not None:
                    contestants[provider.key] = Contestant(call, provider.scope, provider.form.run)
            share = (index + (done + 1) / len(self.providers)) / len(CHECKED_INPUTS)
            self.on_progress(CHECKING_SHARE * share)
        return contestants

    def _check_one(self, provider: Provider, judge: Judge, x: Tensor, dv: Tensor | None) -> Call | None:
        entrant = self.entrants[provider.key]
        try:
            with provider.scope():
                record = replace(self.found[provider.key], runs=entrant.runs(x))
                call, outcome = provider.form.run(partial(_first_call, entrant, x, dv))
                checks = judge.check(outcome)
        except Exception as error:
            self._settle(provider.key, *protocol.failure(error))
            return None
        self.found[provider.key] = replace(record, checks=(*record.checks, *checks))
        for judged in checks:
            if not judged.passed:
                size = "not finite" if judged.error is None else f"{judged.error:.3g}"
                message = f"error of {judged.tensor} on {judged.input} input is {size}, allowed {judged.allowed:.3g}"
                self._settle(provider.key, results.WRONG, message)
                return None
        return call

    def _bind(self, x: Tensor, dv: Tensor | None) -> dict[str, Contestant]:
        """Calls on an input that is not judged: the whole batch, where a part of it was."""
        arranged = _Arranged(x, dv)
        contestants = {}
        for provider in self.providers:
            if provider.key not in self.entrants:
                continue
            try:
                with provider.scope():
                    inputs_of_call = arranged.of(provider)
                    # What is timed may run otherwise than the part that was judged.
                    runs = self.entrants[provider.key].runs(inputs_of_call[0])
                    bind = partial(self.entrants[provider.key].bind, *inputs_of_call)
                    call, _ = provider.form.run(bind)
            except Exception as error:
                self._settle(provider.key, *protocol.failure(error))
                continue
            self.found[provider.key] = replace(self.found[provider.key], runs=runs)
            contestants[provider.key] = Contestant(call, provider.scope, provider.form.run)
        return contestants

    def _weigh(self, contestants: dict[str, Contestant]) -> None:
        """Memory of a second call, once caches are filled; a captured or compiled call hides its tensors on a CPU."""
        for key, contestant in list(contestants.items()):
            entrant = self.entrants[key]
            form = entrant.provider.form
            if form.is_graph or (self.setting.device.type == "cpu" and form.is_compiled):
                continue
            try:
                with contestant.scope():
                    weighed = form.run(partial(_weighed, contestant.call, entrant, self.setting.device))
            except Exception as error:
                self._settle(key, *protocol.failure(error))
                del contestants[key]
                continue
            self.found[key] = replace(self.found[key], memory=weighed)

    def _input(self, kind: str, batch: int) -> tuple[Tensor, Tensor | None]:
        """x, and in training the gradient of the output, both NCHW."""
        device, seed = self.setting.device, self.setting.seed
        x = inputs.make_input(kind, batch, self.case.shape, self.dtype, device, seed)
        if self.case.direction != TRAINING:
            return x, None
        size = (batch, 1000) if self.case.is_network else x.shape
        return x, inputs.make_gradient(size, self.dtype, device, seed)

    def _settle(self, key: str, status: str, message: str) -> None:
        self.found[key] = replace(self.found[key], status=status, message=message)
        self.entrants.pop(key, None)


class _Arranged:
    """An input and the output's gradient in every memory format that is asked for, each made once."""

    def __init__(self, x: Tensor, dv: Tensor | None) -> None:
        self.x, self.dv = x, dv
        self._made: dict[torch.memory_format, tuple[Tensor, Tensor | None]] = {}

    def of(self, provider: Provider) -> tuple[Tensor, Tensor | None]:
        wanted = provider.form.memory_format
        if wanted not in self._made:
            self._made[wanted] = (
                arrange(self.x, wanted),
                None if self.dv is None else arrange(self.dv, wanted),
            )
        return self._made[wanted]


def _first_call(entrant: Entrant, x: Tensor, dv: Tensor | None) -> tuple[Call, Outcome]:
    """The measured call on `x`, and the tensors to judge of its first result."""
    call, read = entrant.bind(x, dv)
    return call, read(call())


def _weighed(call: Callable[[], object], entrant: Entrant, device: torch.device) -> results.Memory:
    """Memory of a second call."""
    call()
    entrant.forget_gradients()
    # Compiled code is traced anew under hooks.
    is_compiled = entrant.provider.form.is_compiled
    weighed = memory.measure_memory(call, device, entrant.given, sees_saved=not is_compiled)
    if is_compiled and entrant.direction == TRAINING:
        kept = memory.kept_for_backward(entrant.output(), entrant.given)
        weighed = replace(weighed, saved_bytes=kept)
    return weighed


def _floor(x: Tensor, case: Case) -> Callable[[], object]:
    """A call that moves what no implementation can avoid: x to v, and in training v and x to dx.

    With a stride, a copy of as many bytes in all.
    """
    if case.shape.stride > 1:
        x = x.new_zeros(round(x.numel() * case.floor_passes / 2))
    v = torch.empty_like(x)
    if case.direction != TRAINING or case.shape.stride > 1:
        return lambda: v.copy_(x)
    dx = torch.empty_like(x)
    return lambda: (v.copy_(x), torch.add(v, x, out=dx))


def _rounded(state: State, dtype: torch.dtype) -> State:
    """Weights that `dtype` holds exactly, so that float64 and every provider start from the same ones."""
    return {
        name: value.to(dtype).float() if value.is_floating_point() else value for name, value in state.items()
    }


def _release(device: torch.device, has_compiled: bool) -> None:
    gc.collect()
    if has_compiled:
        # Compiled code counts against a limit per function: without this, later cases would run eagerly.
        torch.compiler.reset()
    if device.type == "cuda":
        # A device that has failed refuses this, but what was measured must still be saved.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
