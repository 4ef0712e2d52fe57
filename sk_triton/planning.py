"""Plans of the Triton schedules: which can run a unit, and with which configs; :mod:`.preference` takes one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

import torch

from .analytic import merged, resident
from .backend import SCHEDULES, Schedule
from .chips import UNHOISTED_LOOPS
from .environment import triton_version
from .kernels.geometry import MAX_ITEMS, ConvShape, can_run, resident_items
from .kernels.merging import merged_shape
from .plan import BranchLaunch, MergedLaunch, Plan
from .spec import BranchSpec, SKSpec
from .tuning import launches, user_file
from .workload import Workload


def make_plan(schedule: Schedule, workload: Workload) -> Plan:
    """The plan of one schedule, made anew.

    Raises:
        RuntimeError: the schedule cannot run the unit; the message holds the reason.
    """
    plan = plan_or_refusal(schedule, workload)
    if isinstance(plan, str):
        raise RuntimeError(f"schedule {schedule!r} cannot run here: {plan}")
    return plan


plan_schedule = lru_cache(maxsize=1024)(make_plan)
"""As :func:`make_plan`, remembered."""


def plan_or_refusal(schedule: Schedule, workload: Workload) -> Plan | str:
    """The plan of one schedule, made anew, or why it cannot run the unit."""
    return _PLANNERS[schedule](workload)


def refusal(schedule: Schedule, workload: Workload) -> str:
    """Why a schedule cannot run a unit, "" if it can."""
    plan = plan_or_refusal(schedule, workload)
    return plan if isinstance(plan, str) else ""


def possible_schedules(workload: Workload) -> list[Schedule]:
    """The schedules that can run a unit."""
    return [name for name in SCHEDULES if not refusal(name, workload)]


def plan_store(workload: Workload) -> Plan:
    """The plan of schedule "store", which runs every unit."""
    plan = _plan_stored("store", workload)
    select, source = launches.select_config(workload)
    return replace(plan, select=select, sources=(*plan.sources, source))


def _plan_stored(schedule: Schedule, workload: Workload, *, has_gate: bool = True) -> Plan:
    """The parts of a plan that writes its branches."""
    branches = [
        branch_launch(workload, start, stop, shape, "store")
        for start, stop, shape in conv_shapes(workload.spec)
    ]
    passes = 2 * workload.spec.num_branches + 1
    return _plan(schedule, workload, len(branches), passes, tuple(branches), has_gate=has_gate)


def plan_gated(workload: Workload) -> Plan:
    """The plan of schedule "gated", which runs every unit."""
    plan = _plan_stored("gated", workload, has_gate=False)
    config, source = launches.gated_select_config(workload)
    return replace(plan, gated_select=config, sources=(*plan.sources, source))


def _plan_recompute(workload: Workload) -> Plan | str:
    """The plan of schedule "recompute", or why it cannot run."""
    shapes = conv_shapes(workload.spec)
    if len(shapes) > 1:
        return _differing_groups(workload.spec)
    branches = tuple(branch_launch(workload, *shapes[0], task) for task in ("pool", "select"))
    for launch in branches:
        if not can_run(launch.task, launch.shape, launch.config):
            return (
                f"there is no kernel that selects for {_described(workload)}; those that there are take at most 5x5 in "
                "groups of 32 channels, in fp32 3x3 in groups of 8, and few dilations that are no power of two"
            )
    return _plan("recompute", workload, 2, 1, branches)


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
    width = shape.group_channels
    if width > merged.MAX_MERGED_CHANNELS:
        return (
            f"a group has {width} channels; above {merged.MAX_MERGED_CHANNELS} weights of each sample's own "
            "cost more than the passes that they save"
        )
    registers = merged.merged_registers(shape, dtype)
    if registers > merged.MAX_MERGED_REGISTERS:
        return (
            f"merged weights on a {shape.kernels[0]} x {shape.kernels[0]} lattice take {registers} registers; "
            f"at most {merged.MAX_MERGED_REGISTERS} are left"
        )
    border, border_source = launches.border_config(workload, shape)
    conv, conv_source = launches.merged_config(workload, branches, shape)
    plan = _plan("merged", workload, 2, 1, ())
    return replace(
        plan,
        merged_launch=MergedLaunch(branches, shape, border, conv),
        sources=(border_source, conv_source, *plan.sources),
    )


def _plan_resident(workload: Workload) -> Plan | str:
    """The plan of schedule "resident", or why it cannot run."""
    spec, chip = workload.spec, workload.chip
    if triton_version() < UNHOISTED_LOOPS:
        needed = ".".join(map(str, UNHOISTED_LOOPS))
        return f"the kernel needs Triton {needed}; older ones hoist more out of its loop than there are registers"
    if not chip.l2_mib:
        return f"the dies of {chip.name} have an L2 each; what one has pooled another would read from memory"
    if workload.dtype == torch.float32:
        return "fp32 convolves at 36 and more instructions per output, and would do so twice in one launch"
    shapes = conv_shapes(spec)
    if len(shapes) > 1:
        return _differing_groups(spec)
    if spec.gate_width > (most := resident.MAX_RESIDENT_DESCRIPTOR):
        return f"gate_width is {spec.gate_width}; one launch holds the gate's weights up to {most}"
    ((start, stop, shape),) = shapes
    config = resident.resident_config(workload, shape)
    if config is None:
        return (
            f"no tiles serve to pool and to select in one launch for {_described(workload)}; at most 3x3 in groups of "
            "16 channels or 5x5 in groups of 8 have some, and few dilations that are no power of two"
        )
    if workload.n * resident_items(shape, config, *workload.output_size).step >= MAX_ITEMS:
        return f"a batch of {workload.n} samples has more than {MAX_ITEMS} tiles"
    if (held := resident.resident_bytes(workload, config)) > resident.L2_SHARE * chip.l2_mib * 2**20:
        return (
            f"the samples between pooling and selection take {held / 2**20:.1f} MiB of {chip.name}'s {chip.l2_mib} MiB "
            f"of L2; at most {resident.L2_SHARE:.0%} hold"
        )
    source = launches.resident_source(workload)
    launch = BranchLaunch(start, stop, shape, config.branch, source, "resident")
    plan = _plan("resident", workload, 1, 1, (launch,), has_gate=False)
    return replace(plan, resident=config)


def plan_library(workload: Workload) -> Plan:
    """The plan of schedule "library", which runs every unit."""
    spec = workload.spec
    m = spec.num_branches
    # A branch's slice of the input is copied before the library reads it.
    reads = 3 if spec.split_input and m > 1 else m
    plan = _plan("library", workload, reads, 3 * m + 1, ())
    pool, pool_source = launches.pooled_sums_config(workload)
    select, select_source = launches.select_config(workload)
    return replace(plan, reduction=pool, select=select, sources=(pool_source, *plan.sources, select_source))


_PLANNERS: dict[Schedule, Callable[[Workload], Plan | str]] = {
    "store": plan_store,
    "gated": plan_gated,
    "recompute": _plan_recompute,
    "merged": _plan_merged,
    "resident": _plan_resident,
    "library": plan_library,
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


def _differing_groups(spec: SKSpec) -> str:
    """Why branches of several launches cannot be selected from while they are convolved."""
    groups = [branch.groups for branch in spec.branches]
    return f"the branches differ in groups, {groups}, and one launch must hold them all to select"


def _described(workload: Workload) -> str:
    """The branches, by all that decides which kernels take them."""
    spec = workload.spec
    branches, dtype = ", ".join(map(str, spec.branches)), str(workload.dtype).removeprefix("torch.")
    stride = f", stride {spec.stride}" if spec.stride > 1 else ""
    return (
        f"branches {branches} of {spec.group_channels} channels per group{stride} in {dtype} on "
        f"{workload.chip.name}"
    )


def branch_launch(workload: Workload, start: int, stop: int, shape: ConvShape, task: str) -> BranchLaunch:
    """Branches `start` to `stop` in a launch that does `task`, with the config that is looked up for it."""
    config, source = launches.branch_config(workload, shape, task)
    return BranchLaunch(start, stop, shape, config, source, task)


def _plan(
    schedule: Schedule,
    workload: Workload,
    reads: int,
    output_passes: int,
    branches: tuple[BranchLaunch, ...],
    *,
    has_gate: bool = True,
) -> Plan:
    """The parts that all schedules have. `reads`: of the input; `output_passes`: over tensors of the output's size;
    `has_gate`: whether the gate has a launch of its own."""
    spec = workload.spec
    gate, sources = None, tuple(launch.source for launch in branches)
    if has_gate:
        gate, source = launches.gate_config(workload)
        sources += (source,)
    return Plan(
        backend="triton",
        schedule=schedule,
        passes=(reads + 2 * workload.is_converted) * workload.input_passes + output_passes,
        dtype=workload.dtype,
        rejected=(("reference", f"the kernels can run; eager takes {eager_passes(spec)} passes"),),
        branch_launches=branches,
        gate=gate,
        sources=sources,
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


user_file.when_changed(plan_schedule.cache_clear)
