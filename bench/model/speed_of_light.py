"""What a schedule should take on a GPU that need not be present, from its compiled kernels and public figures.

A launch takes the largest of five times, each as if the rest of the GPU were infinitely fast, and the time to start it:

- memory: each tensor's bytes once, except where an earlier launch left them in L2;
- L2: what the programs ask of it, repeats inside a program left to L1: its bytes, or its lines where they take longer
  to look up;
- tensor cores: the multiplies that the instructions execute, padding included, not the useful ones;
- shared memory: what goes through the data path that it shares with L1, conflicts between banks left out, and what
  HGMMA reads by itself;
- issue slots: the instructions of all warps.

The last three are those of the processor with the most programs. A schedule takes the sum over its launches. Latency
that too few resident warps cannot hide is not modelled, so that most times are too short; `Step.resident_warps` says
how many warps there are to hide it. They are no bounds from below either: measured times have been a little shorter,
as where launches overlap or more stays in L2 than is counted.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sk_triton import dispatch, planning
from sk_triton.backend import SCHEDULES, Schedule
from sk_triton.chips import Chip
from sk_triton.kernels.config import BranchConfig
from sk_triton.kernels.geometry import cdiv
from sk_triton.kernels.launch import Launch
from sk_triton.library import Convolution
from sk_triton.plan import Plan
from sk_triton.spec import SKSpec
from sk_triton.workload import Workload

from .. import passes
from ..compiled.footprint import PlannedStep
from ..compiled.phases import counted, has_phases
from ..compiled.planned import planned_steps
from ..compiled.processes import compiling_until_left
from ..grid import precision_of
from .gpus import Gpu, chip_for
from .work import (
    Work,
    convolution_work,
    launch_work,
    library_work,
    memory_bytes,
    operator_work,
    uncompiled_work,
)

if TYPE_CHECKING:
    from ..compiled.compile import Resources

BOUNDS = MEMORY, L2, MATRIX, SHARED, ISSUE = "memory", "L2", "tensor cores", "shared memory", "issue slots"
LAUNCHES = "launches"
"""What a schedule is bound by if starting its kernels takes longest."""

EAGER, COMPILED, FLOOR = "eager", "torch.compile", "floor"
"""What schedules are compared with."""


@dataclass(frozen=True)
class Problem:
    """A unit on a batch of `n` channels_last inputs of `height` x `width` pixels."""

    spec: SKSpec
    n: int
    height: int
    width: int
    dtype: torch.dtype
    allow_tf32: bool = False

    @property
    def outputs(self) -> int:
        """Elements of the result, and of each branch."""
        height, width = self.spec.output_size(self.height, self.width)
        return self.n * self.spec.out_channels * height * width

    @property
    def multiplies(self) -> int:
        """Multiply-adds of all branches' convolutions, those with the padding's zeros included."""
        return self.outputs * sum(math.prod(shape[1:]) for shape in self.spec.weight_shapes)

    @property
    def tensor_bytes(self) -> int:
        """T: one pass over an activation tensor."""
        return self.outputs * self.dtype.itemsize

    def on(self, chip: Chip) -> Workload:
        """What the dispatcher's planner is asked."""
        return Workload(self.spec, self.n, self.height, self.width, self.dtype, chip, self.allow_tf32)


@dataclass(frozen=True)
class Step:
    """The predicted times of one step in seconds, by bound; None where the compiled code does not say.

    resident_warps: most warps that a processor holds at once; waves: rounds in which the programs run.
    """

    work: Work
    seconds: dict[str, float | None]
    launch_seconds: float
    resident_warps: int = 0
    waves: float = 0.0

    @property
    def bound(self) -> str:
        return max(BOUNDS, key=lambda name: self.seconds[name] or 0.0)

    @property
    def total(self) -> float:
        return (self.seconds[self.bound] or 0.0) + self.launch_seconds


@dataclass(frozen=True)
class Prediction:
    """A schedule's predicted time. `configs`: (task, config, where it is from) of its branch launches."""

    schedule: str
    steps: tuple[Step, ...]
    configs: tuple[tuple[str, BranchConfig, str], ...] = ()
    is_ours: bool = True

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(step.total for step in self.steps)

    @property
    def bound(self) -> str:
        """Where most of the time goes."""
        spent: defaultdict[str, float] = defaultdict(float)
        for step in self.steps:
            spent[step.bound] += step.seconds[step.bound] or 0.0
            spent[LAUNCHES] += step.launch_seconds
        return max(spent, key=lambda name: spent[name])

    @property
    def memory_bytes(self) -> float:
        return sum(step.work.memory_bytes for step in self.steps)

    def seconds(self, bound: str) -> float | None:
        """The sum over the steps of one bound's time; None if a kernel does not state it, or nothing does."""
        stated = [
            step.seconds[bound] for step in self.steps if step.work.is_arithmetic or bound in (MEMORY, L2)
        ]
        known = [time for time in stated if time is not None]
        return sum(known) if known and len(known) == len(stated) else None


def schedules_for(
    problem: Problem, chip: Chip, schedules: Sequence[Schedule] = SCHEDULES
) -> list[tuple[str, Plan, Sequence[PlannedStep]]]:
    """(name, plan, steps on meta tensors) of each of the schedules that can compute the problem on a chip."""
    workload = problem.on(chip)
    return [
        (name, *planned_steps(name, workload)[:2])
        for name in schedules
        if not planning.refusal(name, workload)
    ]


def predict(problem: Problem, gpu: Gpu, schedules: Sequence[Schedule] = SCHEDULES) -> list[Prediction]:
    """The prediction of each schedule, then `EAGER`, `COMPILED` and `FLOOR`.

    Those three take their passes at copy bandwidth, convolutions at the dense rate of products where that takes longer,
    and one launch per operator or fused group, which flatters them.

    Raises:
        ValueError: a program of a kernel does not fit on the GPU's processors.
    """
    found = []
    for name, plan, steps in schedules_for(problem, chip_for(gpu), schedules):
        configs = tuple((launch.task, launch.config, str(launch.source)) for launch in plan.branch_launches)
        found.append(Prediction(name, predict_steps(steps, gpu), configs))
    for name, operators in (
        (EAGER, passes.reference(problem.spec).steps),
        (COMPILED, passes.compiled(problem.spec, "").steps),
        (FLOOR, (passes.Step("copy", passes.SPLIT, 1, 1),)),
    ):
        steps_of = tuple(times(_operator(operator, problem, gpu), gpu) for operator in operators)
        found.append(Prediction(name, steps_of, is_ours=False))
    return found


def _operator(operator: passes.Step, problem: Problem, gpu: Gpu) -> Work:
    size = float(operator.passes * problem.tensor_bytes)
    if operator.name != passes.CONVOLUTION:
        return Work(operator.name, size, size)
    precision = precision_of(problem.dtype, problem.allow_tf32)
    return library_work(operator.name, problem.multiplies, precision, gpu, size, size)


def predict_steps(steps: Sequence[PlannedStep], gpu: Gpu) -> tuple[Step, ...]:
    """The times of steps that run one after the other, from a cold L2.

    Raises:
        ValueError: a program of a kernel does not fit on the GPU's processors.
    """
    predicted = []
    for step, moved in zip(steps, memory_bytes(steps, gpu.l2_bytes), strict=True):
        if isinstance(step, Launch):
            work = launch_work(step, _counted(step, gpu.chip), gpu, moved)
        elif isinstance(step, Convolution):
            work = convolution_work(step, gpu, moved)
        else:
            work = operator_work(step, moved)
        predicted.append(times(work, gpu))
    return tuple(predicted)


def least_steps(steps: Sequence[PlannedStep], gpu: Gpu) -> tuple[Step, ...]:
    """As `predict_steps` without compiling: the times that memory and L2 leave, below which no config comes."""
    moved = memory_bytes(steps, gpu.l2_bytes)
    return tuple(
        times(uncompiled_work(step, gpu, share), gpu) for step, share in zip(steps, moved, strict=True)
    )


def predict_all(
    problems: Sequence[Problem], gpu: Gpu, schedules: Sequence[Schedule] = SCHEDULES
) -> list[list[Prediction]]:
    """`predict` for each problem."""
    return list(predict_each(problems, gpu, schedules))


def predict_each(
    problems: Sequence[Problem], gpu: Gpu, schedules: Sequence[Schedule] = SCHEDULES
) -> Iterator[list[Prediction]]:
    """As `predict_all`, as they come: from here, or from another process where this one interprets kernels."""
    if not dispatch.is_interpreted():
        yield from (predict(problem, gpu, schedules) for problem in problems)
        return
    with compiling_until_left(1) as pool:
        yield from pool.map(functools.partial(predict, gpu=gpu, schedules=schedules), problems)


def times(work: Work, gpu: Gpu) -> Step:
    """The times of a step on a GPU."""
    rounds = cdiv(work.programs, gpu.processors)
    # How much longer the processor with the most programs works than if programs could be split evenly.
    imbalance = rounds * gpu.processors / work.programs if work.programs else 1.0
    clocks = gpu.processors * gpu.clock_hz / imbalance
    ports = gpu.l2_port_bytes_per_clock * gpu.clock_hz * min(work.programs or gpu.processors, gpu.processors)
    matrix = None
    if work.flop is not None and work.warp_flop is not None:
        matrix = sum(flop / gpu.matrix_flop_per_s[name] for name, flop in work.flop.items())
        matrix += sum(
            flop / (gpu.warp_matrix_share * gpu.matrix_flop_per_s[name])
            for name, flop in work.warp_flop.items()
        )
        matrix *= imbalance
    shared, issued = work.shared_bytes, work.warp_instructions
    seconds = {
        MEMORY: work.memory_bytes / gpu.memory_bytes_per_s,
        L2: max(work.l2_bytes / min(gpu.l2_bytes_per_s, ports), work.l2_requests / gpu.l2_requests_per_s),
        MATRIX: matrix,
        SHARED: None if shared is None else shared / (gpu.shared_bytes_per_clock * clocks),
        ISSUE: None if issued is None else issued / (gpu.issue_per_clock * clocks),
    }
    waves = work.programs / (work.resident * gpu.processors) if work.resident else 0.0
    return Step(work, seconds, gpu.launch_seconds, min(work.resident, rounds) * work.warps, waves)


def _counted(launch: Launch, chip: str) -> Resources:
    """As `compiled`, all work of a launch that has phases counted."""
    if has_phases(launch):
        return counted(launch, functools.partial(compiled, chip=chip))
    return compiled(launch, chip)


_COMPILED: dict[Any, Resources] = {}


def compiled(launch: Launch, chip: str) -> Resources:
    """What a launch uses, compiled for a chip; launches for which the JIT would take the same code share it."""
    from ..compiled.compile import compile_launch

    kinds: list[Any] = []
    for i, value in enumerate(launch.arguments):
        if isinstance(value, Tensor):
            kinds.append(value.dtype)
        elif isinstance(value, tuple):
            kinds.append(tuple(tensor.dtype for tensor in value))
        else:
            fixed = () if launch.kernel.params[i].do_not_specialize else (value == 1, value % 16 == 0)
            kinds.append((value >= 2**31, *fixed))
    options = (*sorted(launch.constexprs.items()), *sorted(launch.compile_options.items()))
    function = launch.kernel.fn
    key = (function.__module__, function.__name__, chip, options, launch.trips, tuple(kinds))
    if key not in _COMPILED:
        _COMPILED[key] = compile_launch(launch, chip)
    return _COMPILED[key]
