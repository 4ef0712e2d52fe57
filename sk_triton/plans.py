"""Plans of the Triton schedules: which can run a unit, with which configs, and which is expected to be fastest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import torch

from . import analytic, tuning
from .backend import Schedule
from .kernels.config import ColumnConfig
from .kernels.geometry import ConvShape, can_run
from .kernels.merging import merged_shape
from .plan import BranchLaunch, MergedLaunch, Plan
from .spec import BranchSpec, SKSpec
from .workload import Workload


@lru_cache(maxsize=1024)
def plan_schedule(schedule: Schedule, workload: Workload) -> Plan:
    """The plan of one schedule.

    Raises:
        RuntimeError: the schedule cannot run the unit; the message holds the reason.
    """
    plan = _PLANNERS[schedule](workload)
    if isinstance(plan, str):
        raise RuntimeError(f"schedule {schedule!r} cannot run here: {plan}")
    return plan


def refusal(schedule: Schedule, workload: Workload) -> str:
    """Why a schedule cannot run a unit, "" if it can."""
    plan = _PLANNERS[schedule](workload)
    return plan if isinstance(plan, str) else ""


@lru_cache(maxsize=1024)
def fastest_plan(workload: Workload) -> Plan:
    """The plan that is expected to be fastest: the fewest passes among the schedules that memory binds."""
    store = plan_store(workload)
    merged = _plan_merged(workload)
    if not isinstance(merged, str):
        return merged.rejecting(
            "store", f"{store.passes:g} passes over memory, against {merged.passes:g}"
        ).rejecting("recompute", "as many passes as merged, and every branch convolved twice")
    store = store.rejecting("merged", merged)
    recompute = _plan_recompute(workload)
    if isinstance(recompute, str):
        return store.rejecting("recompute", recompute)
    if workload.dtype == torch.float32:
        # 36 to 350 instructions per output: convolving twice costs more than the passes it saves.
        return store.rejecting(
            "recompute", "in fp32 the convolution is bound by arithmetic, and would run twice"
        )
    if (
        isinstance(recompute.branch_launches[0].config, ColumnConfig)
        and workload.spec.branch_in_channels > 16 * workload.spec.branches[0].groups
    ):
        # Predicted for stage 4 on an H100: 50 µs, against 44 of "store" (`sk-triton explain --stage 4`).
        return store.rejecting(
            "recompute", "groups above 16 channels are bound by loading weights, twice as many"
        )
    if recompute.passes >= store.passes:
        return store.rejecting(
            "recompute", f"{recompute.passes:g} passes over memory, against {store.passes:g}"
        )
    return recompute.rejecting("merged", merged).rejecting(
        "store", f"{store.passes:g} passes over memory, against {recompute.passes:g}"
    )


def plan_store(workload: Workload) -> Plan:
    """The plan of schedule "store", which runs every unit."""
    launches = [
        branch_launch(workload, start, stop, shape, "store")
        for start, stop, shape in conv_shapes(workload.spec)
    ]
    return _plan("store", workload, len(launches), 2 * workload.spec.num_branches + 1, tuple(launches))


def _plan_recompute(workload: Workload) -> Plan | str:
    """The plan of schedule "recompute", or why it cannot run."""
    shapes = conv_shapes(workload.spec)
    if len(shapes) > 1:
        return "the branches differ in groups, and one launch must hold them all to select"
    launches = tuple(branch_launch(workload, *shapes[0], task) for task in ("pool", "select"))
    for launch in launches:
        if not can_run(launch.task, launch.shape, launch.config):
            return (
                f"{type(launch.config).__name__} stores its branches: groups above 32 channels, large kernels, and "
                "dilations that are no power of two have no kernel that selects"
            )
    return _plan("recompute", workload, 2, 1, launches)


def _plan_merged(workload: Workload) -> Plan | str:
    """The plan of schedule "merged", or why it cannot run."""
    spec, dtype = workload.spec, workload.dtype
    if spec.branch_act != "identity":
        return f"branch_act is {spec.branch_act}; only linear branches merge into one convolution"
    if spec.split_input:
        return "split_input is set; branches of different inputs do not merge"
    shapes = conv_shapes(spec)
    if len(shapes) > 1:
        groups = sorted({branch.groups for branch in spec.branches})
        return f"the branches have {groups} groups; only equal groups merge"
    if dtype == torch.float32 and not workload.allow_tf32:
        return "fp32 is IEEE; products without tensor cores leave no registers for the merged weights"
    ((_, _, branches),) = shapes
    shape = merged_shape(branches)
    width = max(shape.c_in, shape.c_out) // shape.groups
    if width > analytic.MAX_MERGED_CHANNELS:
        return (
            f"a group has {width} channels; above {analytic.MAX_MERGED_CHANNELS} weights of each sample's own cost "
            "more than the passes that they save"
        )
    registers = analytic.merged_registers(shape, dtype)
    if registers > analytic.MAX_MERGED_REGISTERS:
        return (
            f"merged weights on a {shape.kernels[0]} x {shape.kernels[0]} lattice take {registers} registers; "
            f"at most {analytic.MAX_MERGED_REGISTERS} are left"
        )
    merged = MergedLaunch(
        branches,
        shape,
        analytic.border_config(shape, workload.n, workload.h_in, workload.w_in, workload.chip),
        analytic.merged_config(shape, workload.n, *workload.output_size, dtype, workload.chip),
    )
    return replace(_plan("merged", workload, 2, 1, ()), merged_launch=merged)


_PLANNERS: dict[Schedule, Callable[[Workload], Plan | str]] = {
    "store": plan_store,
    "recompute": _plan_recompute,
    "merged": _plan_merged,
}


def conv_shapes(spec: SKSpec) -> list[tuple[int, int, ConvShape]]:
    """The launches that a unit's branches take: `(start, stop, shape)` for each run of branches with equal groups."""
    shapes = []
    for groups, group in groupby(enumerate(spec.branches), key=lambda item: item[1].groups):
        members: list[tuple[int, BranchSpec]] = list(group)
        shape = ConvShape(
            c_in=spec.branch_in_channels,
            c_out=spec.out_channels,
            groups=groups,
            kernels=tuple(branch.kernel_size for _, branch in members),
            dilations=tuple(branch.dilation for _, branch in members),
            stride=spec.stride,
            is_split=spec.split_input,
        )
        shapes.append((members[0][0], members[-1][0] + 1, shape))
    return shapes


def branch_launch(workload: Workload, start: int, stop: int, shape: ConvShape, task: str) -> BranchLaunch:
    """Branches `start` to `stop` in a launch that does `task`, as ``tuning.branch_config`` would have it."""
    config, source = tuning.branch_config(
        shape,
        workload.n,
        *workload.output_size,
        workload.dtype,
        workload.allow_tf32,
        workload.chip,
        task=task,
    )
    return BranchLaunch(start, stop, shape, config, source, task)


def _plan(
    schedule: str, workload: Workload, reads: int, output_passes: int, launches: tuple[BranchLaunch, ...]
) -> Plan:
    """The parts that all schedules have. `reads`: of the input; `output_passes`: over tensors of the output's size."""
    spec = workload.spec
    m, c = spec.num_branches, spec.out_channels
    return Plan(
        backend="triton",
        schedule=schedule,
        passes=(reads + 2 * workload.is_converted) * workload.input_passes + output_passes,
        dtype=workload.dtype,
        rejected=(("reference", f"the kernels can run; eager takes {eager_passes(spec)} passes"),),
        branch_launches=launches,
        gate=analytic.gate_config(m, c, spec.gate_width, workload.dtype),
        select=analytic.select_config(math.prod(workload.output_size), c) if schedule == "store" else None,
        has_relu=spec.branch_act == "relu",
        gate_has_relu=spec.gate_act == "relu",
        allow_tf32=workload.allow_tf32 and workload.dtype == torch.float32,
    )


def eager_passes(spec: SKSpec) -> float:
    """Passes of the reference in eager mode: each operator reads its inputs and writes its result.

    An input of another size than the output counts as one pass per branch all the same.
    """
    m = spec.num_branches
    split = 2 + 2 * spec.branch_norm + 2 * (spec.branch_act != "identity")
    fuse = 3 * (m - 1) + 1
    select = 2 * m + 3 * (m - 1)
    return m * split + fuse + select
