"""Plans of the Triton schedules: which can run a unit, with which configs, and which is expected to be fastest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from math import prod

import torch

from . import analytic_gated, analytic_merged, analytic_resident
from .backend import SCHEDULES, Schedule
from .chips import UNHOISTED_LOOPS
from .environment import triton_version
from .kernels.config import ColumnConfig, TapConfig
from .kernels.geometry import MAX_ITEMS, ConvShape, can_run, resident_items, tiles
from .kernels.merging import merged_shape
from .plan import BranchLaunch, MergedLaunch, Plan
from .spec import BranchSpec, SKSpec
from .tuning import cache, launches
from .tuning.lookup import tuned
from .workload import Workload

# Channels per group up to which the convolution is bound by memory, so that fusing it pays; above, it is the library's.
MAX_KERNEL_CHANNELS = 64
# Channels per group from which kernels above 3x3, multiplied tap by tap, lose to the library's convolution: 145 against
# 77 µs for 3x3 and 5x5 branches of 32, 1024 @ 7², batch 128, on an H100 (bench/results/h100/launches.csv).
MIN_LIBRARY_TAP_CHANNELS = 32


def make_plan(schedule: Schedule, workload: Workload) -> Plan:
    """The plan of one schedule, made anew.

    Raises:
        RuntimeError: the schedule cannot run the unit; the message holds the reason.
    """
    plan = _PLANNERS[schedule](workload)
    if isinstance(plan, str):
        raise RuntimeError(f"schedule {schedule!r} cannot run here: {plan}")
    return plan


plan_schedule = lru_cache(maxsize=1024)(make_plan)
"""As :func:`make_plan`, remembered."""


def refusal(schedule: Schedule, workload: Workload) -> str:
    """Why a schedule cannot run a unit, "" if it can."""
    plan = _PLANNERS[schedule](workload)
    return plan if isinstance(plan, str) else ""


def possible_schedules(workload: Workload) -> list[Schedule]:
    """The schedules that can run a unit."""
    return [name for name in SCHEDULES if not refusal(name, workload)]


@lru_cache(maxsize=1024)
def fastest_plan(workload: Workload) -> Plan:
    """The plan of the schedule that was measured to be fastest on this GPU, else of the one expected to be."""
    expected = expected_plan(workload)

    @functools.cache
    def expected_at(n: int) -> str:
        return expected.schedule if n == workload.n else expected_plan(replace(workload, n=n)).schedule

    request = launches.schedule_request(workload, lambda: possible_schedules(workload), expected_at)
    found = tuned(request, workload.chip)
    if found is None:
        return expected
    plan = expected
    if found.config != expected.schedule:
        plan = make_plan(found.config, workload)
        for name in SCHEDULES:
            if name != found.config:
                plan = plan.rejecting(name, refusal(name, workload) or f"slower: {found.source}")
    return replace(plan, sources=(found.source, *plan.sources))


def expected_plan(workload: Workload) -> Plan:
    """The plan that is expected to be fastest: the library in wide groups, else for few samples that of the fewest
    launches, for many that of the fewest passes."""
    library = _plan_library(workload)
    slower = library_reason(workload)
    if not slower:
        plan = _expected_kernels(workload)
        return plan.rejecting(
            "library",
            f"{library.passes:g} passes over memory, against {plan.passes:g}: it fuses no convolution",
        )
    for name in SCHEDULES:
        if name != library.schedule:
            library = library.rejecting(name, refusal(name, workload) or slower)
    return library


def library_reason(workload: Workload) -> str:
    """Why the library's convolution is expected to be faster than the kernels'; "" if it is not."""
    widest = workload.spec.group_channels
    if widest > MAX_KERNEL_CHANNELS:
        return (
            f"a branch has {widest} channels per group; above {MAX_KERNEL_CHANNELS} the library's convolution is "
            "expected to be faster"
        )
    # Not known of AMD's library, and not in fp32.
    if workload.chip.l2_mib and workload.dtype != torch.float32 and widest >= MIN_LIBRARY_TAP_CHANNELS:
        for launch in plan_store(workload).branch_launches:
            if isinstance(launch.config, TapConfig) and max(launch.shape.kernels) > 3:
                return (
                    f"a branch above 3x3 has {widest} channels per group: only one kernel takes it, tap by tap; "
                    f"from {MIN_LIBRARY_TAP_CHANNELS} the library's convolution was faster (77 µs against 145 on an "
                    "H100 at 1024 @ 7²)"
                )
    return ""


def _expected_kernels(workload: Workload) -> Plan:
    """Of the schedules that convolve by kernels: for few samples that of fewer launches, else of fewer passes."""
    gated = _plan_gated(workload)
    reason = _gated_reason(workload, gated)
    if reason:
        return _fewest_passes(workload).rejecting("gated", reason)
    recompute = plan_recompute(workload)
    more = (
        f"more launches than {len(gated.branch_launches) + 1}: for so few samples their starts are the time"
    )
    return (
        gated.rejecting("store", more)
        .rejecting("recompute", recompute if isinstance(recompute, str) else more)
        .rejecting("merged", refusal("merged", workload) or more)
        .rejecting("resident", _unmeasured_reason(workload))
    )


def _gated_reason(workload: Workload, gated: Plan) -> str:
    """Why "gated" is not expected to be faster than three launches, "" if it is."""
    size = workload.output_size
    summed = sum(prod(tiles(launch.shape, launch.config, *size)) for launch in gated.branch_launches)
    return analytic_gated.gated_reason(workload, summed)


def _fewest_passes(workload: Workload) -> Plan:
    """Of the schedules that convolve by kernels, the plan of the fewest passes among those that memory binds."""
    store = plan_store(workload)
    merged = _plan_merged(workload)
    if not isinstance(merged, str):
        return (
            merged.rejecting("store", f"{store.passes:g} passes over memory, against {merged.passes:g}")
            .rejecting("recompute", "as many passes as merged, and every branch convolved twice")
            .rejecting("resident", "every branch convolved twice, where merged convolves once for all")
        )
    store = store.rejecting("merged", merged)
    recompute = plan_recompute(workload)
    if isinstance(recompute, str):
        return store.rejecting("recompute", recompute)
    if recompute.passes >= store.passes:
        return store.rejecting(
            "recompute", f"{recompute.passes:g} passes over memory, against {store.passes:g}"
        )
    return (
        recompute.rejecting("resident", _unmeasured_reason(workload))
        .rejecting("merged", merged)
        .rejecting("store", f"{store.passes:g} passes over memory, against {recompute.passes:g}")
    )


def _unmeasured_reason(workload: Workload) -> str:
    """Why "resident" is not expected to be the schedule to take."""
    resident = _plan_resident(workload)
    if isinstance(resident, str):
        return resident
    chip = workload.chip
    (launch,) = resident.branch_launches
    if analytic_resident.has_short_columns(launch.config, launch.shape, chip):
        # Predicted for an A100: 204 µs against 194 in stage 1.
        return f"it fits {chip.name}'s registers with short columns only, whose instructions cost more than a pass"
    # Eight channels a program ask L2 for half sectors: bench/results/h100/units.csv, stage 1.
    return (
        f"{resident.passes:g} passes over memory in one launch, but slower where it was measured (407 µs against 194 "
        "on an H100, 128 samples at 128 @ 56²); sk-triton tune measures it here"
    )


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


def _plan_gated(workload: Workload) -> Plan:
    """The plan of schedule "gated", which runs every unit."""
    plan = _plan_stored("gated", workload, has_gate=False)
    config, source = launches.gated_select_config(workload)
    return replace(plan, gated_select=config, sources=(*plan.sources, source))


def _plan_recompute(workload: Workload) -> Plan | str:
    """The plan of schedule "recompute", or why it cannot run."""
    shapes = conv_shapes(workload.spec)
    if len(shapes) > 1:
        return "the branches differ in groups, and one launch must hold them all to select"
    branches = tuple(branch_launch(workload, *shapes[0], task) for task in ("pool", "select"))
    for launch in branches:
        if not can_run(launch.task, launch.shape, launch.config):
            return (
                f"{type(launch.config).__name__} stores its branches: groups above 32 channels, large kernels, and "
                "dilations that are no power of two have no kernel that selects"
            )
    return _plan("recompute", workload, 2, 1, branches)


def plan_recompute(workload: Workload) -> Plan | str:
    """The plan of schedule "recompute" where convolving again is expected to cost less than writing the branches;
    elsewhere, or where it cannot run, the reason."""
    plan = _plan_recompute(workload)
    if isinstance(plan, str):
        return plan
    if workload.dtype == torch.float32:
        # 36 to 350 instructions per output: convolving twice costs more than the passes it saves.
        return "in fp32 the convolution is bound by arithmetic, and would run twice"
    if (
        isinstance(plan.branch_launches[0].config, ColumnConfig)
        and workload.spec.branch_in_channels > 16 * workload.spec.branches[0].groups
    ):
        # Predicted for stage 4: 53 µs, against 47 of "store" (`sk-triton explain --gpu h100 --stage 4`).
        return "groups above 16 channels are bound by loading weights, twice as many"
    return plan


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
    if width > analytic_merged.MAX_MERGED_CHANNELS:
        return (
            f"a group has {width} channels; above {analytic_merged.MAX_MERGED_CHANNELS} weights of each sample's own "
            "cost more than the passes that they save"
        )
    registers = analytic_merged.merged_registers(shape, dtype)
    if registers > analytic_merged.MAX_MERGED_REGISTERS:
        return (
            f"merged weights on a {shape.kernels[0]} x {shape.kernels[0]} lattice take {registers} registers; "
            f"at most {analytic_merged.MAX_MERGED_REGISTERS} are left"
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
        return "the branches differ in groups, and one launch must hold them all to select"
    ((start, stop, shape),) = shapes
    config = analytic_resident.resident_config(workload, shape)
    if config is None:
        return (
            "groups above 16 channels, kernels above 5x5, dilations that are no power of two and descriptors above "
            f"{analytic_resident.MAX_RESIDENT_DESCRIPTOR} entries have no tiles that one launch both pools and selects"
        )
    if workload.n * resident_items(shape, config, *workload.output_size).step >= MAX_ITEMS:
        return f"a batch of {workload.n} samples has more than {MAX_ITEMS} tiles"
    if (
        held := analytic_resident.resident_bytes(workload, config)
    ) > analytic_resident.L2_SHARE * chip.l2_mib * 2**20:
        return (
            f"the samples between pooling and selection take {held / 2**20:.1f} MiB of {chip.name}'s {chip.l2_mib} MiB "
            f"of L2; at most {analytic_resident.L2_SHARE:.0%} hold"
        )
    source = launches.resident_source(workload)
    launch = BranchLaunch(start, stop, shape, config.branch, source, "resident")
    plan = _plan("resident", workload, 1, 1, (launch,), has_gate=False)
    return replace(plan, resident=config)


def _plan_library(workload: Workload) -> Plan:
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
    "gated": _plan_gated,
    "recompute": _plan_recompute,
    "merged": _plan_merged,
    "resident": _plan_resident,
    "library": _plan_library,
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


cache.when_changed(plan_schedule.cache_clear)
cache.when_changed(fastest_plan.cache_clear)
