"""What the kernels of inference use on a chip, from the compiled code alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sk_triton import planning
from sk_triton.backend import SCHEDULES, Schedule
from sk_triton.chips import AMD_COMPILES, CHIPS, is_amd
from sk_triton.environment import triton_version
from sk_triton.kernels.launch import Launch, flat
from sk_triton.plan import BranchLaunch, Plan
from sk_triton.workload import Workload

from ..grid import GridCase
from .phases import counted, has_phases
from .planned import planned_steps
from .processes import compiling_until_left

if TYPE_CHECKING:
    from .compile import Resources


MATRIX_KERNELS = (
    "branch_conv_stream",
    "branch_conv_window",
    "branch_conv_column",
    "branch_conv_held",
    "branch_conv_tap",
    "merged_conv",
    "unit_resident",
    "branch_grad_stream",
    "branch_grad_data",
    "branch_grad_weight",
)
"""What is meant to use tensor cores, or what its name starts with."""
GATES = ("gate", "gated_select")
"""Those of inference, by their whole names: training's use no tensor cores. In fp32 units their products are IEEE."""


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one chip.

    `per_output`: thread-instructions per element of the branches that the launch computes, waste at the edges included;
    None where the compiler unrolled loops so that they cannot be counted, and for the gate.
    """

    case: GridCase
    kernel: str
    config: str
    resources: Resources
    per_output: float | None
    branch_launch: BranchLaunch | None

    @property
    def faults(self) -> list[str]:
        """What a kernel must not do: spill, exceed shared memory, or miss the tensor cores it is meant to use."""
        found = self.resources.excesses
        # fp32 units take the tensor cores only in the branches, only where TF32 is allowed, and never depthwise.
        precision = (
            "fp32" if self.kernel in GATES and self.case.dtype == torch.float32 else self.case.precision
        )
        is_meant_to = self.kernel in GATES or self.kernel.startswith(MATRIX_KERNELS)
        uses_matrix = is_meant_to and precision != "fp32"
        if uses_matrix and not self.resources.matrix:
            found.append("no tensor-core instruction")
        return found


def launches(case: GridCase, target: str, schedule: Schedule = "store") -> tuple[Plan, list[Launch]]:
    """The plan and the kernel launches of `case` under a schedule on chip `target`, on meta tensors.

    Raises:
        RuntimeError: the schedule cannot run the case.
    """
    plan, steps, _ = planned_steps(schedule, workload_of(case, target))
    return plan, [step for step in steps if isinstance(step, Launch)]


def workload_of(case: GridCase, target: str) -> Workload:
    return Workload(case.spec, case.n, case.size, case.size, case.dtype, CHIPS[target], case.allow_tf32)


def measure(
    case: GridCase, target: str, *, with_phases: bool = True, without: Sequence[Schedule] = ()
) -> list[Row]:
    """Compile the case's kernels for `target`, those of every schedule that can run it, and read what they use.

    `with_phases`: the phases of a kernel that has any are compiled once more each, to count its instructions.
    `without`: schedules to leave out.
    """
    from .compile import compile_launch, compile_launches

    planned = [
        (launch, plan.branch_launches[i] if i < len(plan.branch_launches) else None)
        for plan, found in (
            launches(case, target, name) for name in schedules(case, target) if name not in without
        )
        for i, launch in enumerate(_branches_first(found))
    ]
    different: list[tuple[Launch, BranchLaunch | None]] = []
    for launch, branch_launch in planned:
        if not any(_compile_alike(launch, other) for other, _ in different):
            different.append((launch, branch_launch))
    height, width = case.spec.output_size(case.size, case.size)
    outputs = case.n * height * width * case.spec.out_channels
    rows: list[Row] = []
    compiled = compile_launches([launch for launch, _ in different], target)
    for (launch, branch_launch), used in zip(different, compiled, strict=True):
        if has_phases(launch):
            branch_launch = None  # its config is no branch kernel's
            if with_phases:
                used = counted(launch, functools.partial(compile_launch, target=target))
        computed = outputs * len(launch.constexprs.get("KERNELS", (1,)))
        rows.append(row_of(case, launch, used, computed, branch_launch))
    return rows


def _compile_alike(launch: Launch, other: Launch) -> bool:
    """Whether launches of one case compile to the same code; the gate does under every schedule."""
    is_gate = kernel_name(launch) == kernel_name(other) == "gate"
    return is_gate or (launch.kernel is other.kernel and _code(launch) == _code(other))


def _code(launch: Launch) -> tuple[Any, ...]:
    """What tells one compilation of a kernel from another: launches of which it is equal compile alike."""
    kinds = [getattr(argument, "dtype", argument) for argument in flat(launch.arguments)]
    return kinds, launch.constexprs, launch.options, launch.trips


def kernel_name(launch: Launch) -> str:
    """The name of a launch's kernel, with the task if it has several."""
    name = launch.kernel.fn.__name__.removesuffix("_kernel").removesuffix("_fwd")
    task = launch.constexprs.get("TASK", "store")
    return name if task == "store" else f"{name}, {task}"


def row_of(
    case: GridCase, launch: Launch, used: Resources, computed: int, branch_launch: BranchLaunch | None = None
) -> Row:
    """The row of a launch that computes as many elements of the branches, or of the output, as `computed` says."""
    name, per_output = kernel_name(launch), None
    if used.instructions is not None and name not in GATES:
        per_output = used.instructions * used.threads * torch.Size(launch.grid).numel() / computed
    sizes = {k: v for k, v in launch.constexprs.items() if k.startswith(("BLOCK", "RUN"))}
    config = " ".join(f"{k}={v}" for k, v in sizes.items()) + f" num_warps={launch.options['num_warps']}"
    return Row(case, name, config, used, per_output, branch_launch)


def schedules(case: GridCase, target: str) -> list[Schedule]:
    """The schedules that can run a case."""
    return [name for name in SCHEDULES if not planning.refusal(name, workload_of(case, target))]


def _branches_first(found: list[Launch]) -> list[Launch]:
    """Launches with those of the plan's branches first, in their order."""
    return sorted(found, key=lambda launch: "KERNELS" not in launch.constexprs)


def measure_all(jobs: Sequence[Callable[[], list[Row]]], workers: int) -> Iterator[list[Row]]:
    """What each job gives, in order, in `workers` new processes, where kernels are compiled, not interpreted. A job is
    a partial of `measure`, or of another module's."""
    with compiling_until_left(workers) as pool:
        for future in [pool.submit(job) for job in jobs]:
            yield future.result()


def compilable_chips() -> list[str]:
    """The chips that the installed Triton compiles for: gfx942 from 3.5 on."""
    return [name for name in CHIPS if not is_amd(name) or triton_version() >= AMD_COMPILES]
