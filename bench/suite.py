"""The `layer` suite: every case of a grid, each provider checked first and then timed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from . import inputs, protocol, results
from .providers import UNITS, Forward, Provider, State, Unit, make_state
from .shapes import STAGES, Grid, Stage

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TIMED_INPUT = inputs.RANDOM
CHECKING_SHARE = 0.5
"""Share of a case's progress that stands for building and checking; the rest is timing."""


@dataclass(frozen=True)
class Case:
    """Providers of one case compute the same function of the same input with the same weights."""

    unit: Unit
    stage: Stage
    batch: int
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.unit.key} {self.stage.name} batch {self.batch} {self.dtype}"


@dataclass(frozen=True)
class Setting:
    """What all the cases of a run share. `providers` maps a unit's key to its competitors."""

    device: torch.device
    seed: int
    providers: dict[str, list[Provider]]
    timer: protocol.Timer
    budget: protocol.Budget = field(default_factory=protocol.Budget)


def cases(grid: Grid) -> Iterator[Case]:
    """The cases of a grid, unit by unit, small batches first."""
    for unit in UNITS.values():
        for dtype in grid.dtypes:
            for stage in grid.stages:
                for batch in grid.batches:
                    yield Case(unit, STAGES[stage], batch, dtype)


@torch.no_grad()
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
    competitors = setting.providers[case.unit.key]
    outcome = {provider.key: _blank(case, provider) for provider in competitors}
    measured = protocol.Measurement()
    try:
        _measure_case(case, setting, outcome, measured, on_progress)
    except Exception as error:  # the oracle or the input failed: nobody can be judged
        status, message = protocol.failure(error)
        for key, record in outcome.items():
            if record.status == results.NOT_MEASURED:
                outcome[key] = replace(record, status=status, message=message)
    finally:
        for key, record in outcome.items():
            timing = measured.timing(key)
            if key in measured.failures:
                status, message = measured.failures[key]
                record = replace(record, status=status, message=message)
            elif timing:
                record = replace(record, status=results.OK, message=None, timing=timing)
            records.append(record)
        _release(setting.device)


def _measure_case(
    case: Case,
    setting: Setting,
    outcome: dict[str, results.Record],
    measured: protocol.Measurement,
    on_progress: Callable[[float], None],
) -> None:
    dtype, competitors = DTYPES[case.dtype], setting.providers[case.unit.key]
    state = _rounded(make_state(case.unit, case.stage, setting.seed), dtype)
    forwards = _build(case, setting, outcome, state)
    steps = len(inputs.KINDS) * max(len(competitors), 1)
    step = 0
    timed_input = None
    for kind in inputs.KINDS:
        x = inputs.make_input(kind, case.batch, case.stage, dtype, setting.device, setting.seed)
        reference, eager_error = _oracle(case, setting.device, state, x, dtype)
        timed_input = x if kind == TIMED_INPUT else timed_input
        for provider in competitors:
            if provider.key in forwards:
                judged = _judge(forwards[provider.key], provider, kind, x, reference, eager_error, dtype)
                outcome[provider.key] = _add_check(outcome[provider.key], judged)
                if outcome[provider.key].status != results.NOT_MEASURED:
                    del forwards[provider.key]
            step += 1
            on_progress(CHECKING_SHARE * step / steps)
        del reference
    assert timed_input is not None
    calls = {}
    for provider in competitors:
        if provider.key in forwards:
            calls[provider.key] = partial(forwards[provider.key], provider.arrange(timed_input))
    protocol.measure(
        calls,
        setting.timer,
        setting.budget,
        measured,
        lambda fraction: on_progress(CHECKING_SHARE + (1 - CHECKING_SHARE) * fraction),
    )


def _build(
    case: Case, setting: Setting, outcome: dict[str, results.Record], state: State
) -> dict[str, Forward]:
    """The providers that can run here, ready to be called; why the others cannot goes to `outcome`."""
    forwards = {}
    for provider in setting.providers[case.unit.key]:
        missing = provider.source.missing()
        if missing:
            outcome[provider.key] = replace(outcome[provider.key], status=results.SKIPPED, message=missing)
            continue
        try:
            forwards[provider.key] = provider.build(case.stage, state, DTYPES[case.dtype], setting.device)
        except Exception as error:
            status, message = protocol.failure(error)
            outcome[provider.key] = replace(outcome[provider.key], status=status, message=message)
    return forwards


def _oracle(
    case: Case, device: torch.device, state: State, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """The yardstick's float64 result on `x`, and its own largest error in `dtype`."""
    module = case.unit.yardstick.module(case.stage)
    module.load_state_dict(state)
    module.eval().to(device).double()
    reference = torch.cat([module(part.double()) for part in x.split(protocol.CHUNK)])
    return reference, protocol.largest_error(module.to(dtype)(x), reference)


def _judge(
    forward: Forward,
    provider: Provider,
    kind: str,
    x: Tensor,
    reference: Tensor,
    eager_error: float,
    dtype: torch.dtype,
) -> results.Check | Exception:
    try:
        return protocol.check(kind, forward(provider.arrange(x)), reference, eager_error, dtype)
    except Exception as error:
        return error


def _add_check(record: results.Record, judged: results.Check | Exception) -> results.Record:
    if isinstance(judged, Exception):
        status, message = protocol.failure(judged)
        return replace(record, status=status, message=message)
    record = replace(record, checks=(*record.checks, judged))
    if judged.passed:
        return record
    size = "not finite" if judged.error is None else f"{judged.error:.3g}"
    message = f"error on {judged.input} input is {size}, allowed {judged.allowed:.3g}"
    return replace(record, status=results.WRONG, message=message)


def _blank(case: Case, provider: Provider) -> results.Record:
    return results.Record(
        unit=case.unit.key,
        stage=case.stage.index,
        channels=case.stage.channels,
        height=case.stage.height,
        width=case.stage.width,
        batch=case.batch,
        dtype=case.dtype,
        source=provider.source.key,
        source_label=provider.source.label,
        form=provider.form.key,
        form_label=provider.form.label,
        ours=provider.source.ours,
        status=results.NOT_MEASURED,
    )


def _rounded(state: State, dtype: torch.dtype) -> State:
    """Weights that `dtype` holds exactly, so that float64 and every provider start from the same ones."""
    return {
        name: value.to(dtype).float() if value.is_floating_point() else value for name, value in state.items()
    }


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        # Compiled code counts against a limit per function: without this, later cases would run eagerly.
        torch.compiler.reset()
        # A device that has failed refuses this too, but what was measured must still be saved.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
