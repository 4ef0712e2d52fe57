"""Which of the Triton schedules runs a unit: the one measured to be fastest, else the one expected to be, and why."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from .analytic.gated import gated_reason
from .analytic.resident import has_short_columns
from .backend import SCHEDULES, Schedule, current_schedule
from .kernels.config import ColumnConfig, TapConfig
from .kernels.geometry import tile_count
from .plan import Plan
from .planning import (
    make_plan,
    plan_gated,
    plan_library,
    plan_or_refusal,
    plan_schedule,
    plan_store,
    possible_schedules,
    refusal,
)
from .spec import SKSpec
from .tuning import launches, user_file
from .tuning.lookup import analytic_only, tuned
from .workload import Workload, workload_of

# Channels per group up to which the convolution is bound by memory, so that fusing it pays; above, it is the library's.
MAX_KERNEL_CHANNELS = 64
# Channels per group from which kernels above 3x3, multiplied tap by tap, lose to the library's convolution: on an H100
# 145 µs against 77 for 3x3 and 5x5 branches of 32, 1024 @ 7², batch 128 (bench/results/h100/launches.csv).
MIN_LIBRARY_TAP_CHANNELS = 32


def inference_plan(x: Tensor, spec: SKSpec) -> Plan:
    """The kernels' plan for inference, where nothing speaks against them.

    Raises:
        RuntimeError: ``use_backend`` asks for a schedule that cannot run the unit.
    """
    workload, schedule = workload_of(x, spec), current_schedule()
    return plan_schedule(schedule, workload) if schedule is not None else fastest_plan(workload)


@lru_cache(maxsize=1024)
def fastest_plan(workload: Workload) -> Plan:
    """The plan of the schedule that was measured to be fastest on this GPU, else of the one expected to be."""
    expected = expected_plan(workload)

    @functools.cache
    def expected_at(n: int) -> str:
        return expected.schedule if n == workload.n else expected_schedule(replace(workload, n=n))

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
    """The plan that is expected to be fastest, with the configs that are looked up for it.

    Which schedule that is depends on the workload alone, not on what was tuned for some of its launches.
    """
    with analytic_only():
        expected = _expectation(workload)
    return replace(make_plan(cast(Schedule, expected.schedule), workload), rejected=expected.rejected)


def expected_schedule(workload: Workload) -> Schedule:
    """The schedule of :func:`expected_plan`."""
    with analytic_only():
        return cast(Schedule, _expectation(workload).schedule)


def library_reason(workload: Workload) -> str:
    """Why the library's convolution is expected to be faster than the kernels'; "" if it is not."""
    with analytic_only():
        return _library_reason(workload)


def recompute_reason(workload: Workload) -> str:
    """Why convolving again is expected to cost more than writing the branches, or cannot be done; "" if neither."""
    with analytic_only():
        recompute = _worthwhile_recompute(workload)
    return recompute if isinstance(recompute, str) else ""


# What follows takes the analytic configs: it runs under `analytic_only`.


def _expectation(workload: Workload) -> Plan:
    """The library in wide groups, else for few samples the plan of the fewest launches, for many that of the fewest
    passes."""
    library = plan_library(workload)
    slower = _library_reason(workload)
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


def _library_reason(workload: Workload) -> str:
    widest = workload.spec.group_channels
    if widest > MAX_KERNEL_CHANNELS:
        return (
            f"a branch has {widest} channels per group; above {MAX_KERNEL_CHANNELS} the library's convolution is "
            "expected to be faster"
        )
    # Not known of AMD's library, and not in fp32.
    if not workload.chip.is_amd and workload.dtype != torch.float32 and widest >= MIN_LIBRARY_TAP_CHANNELS:
        for launch in plan_store(workload).branch_launches:
            if isinstance(launch.config, TapConfig) and max(launch.shape.kernels) > 3:
                return (
                    f"a branch above 3x3 has {widest} channels per group: only one kernel takes it, tap by tap; "
                    f"from {MIN_LIBRARY_TAP_CHANNELS} the library's convolution is expected to be faster"
                )
    return ""


def _expected_kernels(workload: Workload) -> Plan:
    """Of the schedules that convolve by kernels: for few samples that of fewer launches, else of fewer passes."""
    gated = plan_gated(workload)
    reason = _gated_reason(workload, gated)
    if reason:
        return _fewest_passes(workload).rejecting("gated", reason)
    recompute = _worthwhile_recompute(workload)
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
    summed = sum(tile_count(launch.shape, launch.config, *size) for launch in gated.branch_launches)
    return gated_reason(workload, summed)


def _fewest_passes(workload: Workload) -> Plan:
    """Of the schedules that convolve by kernels, the plan of the fewest passes among those that memory binds."""
    store = plan_store(workload)
    merged = plan_or_refusal("merged", workload)
    if not isinstance(merged, str) and merged.passes < store.passes:
        return (
            merged.rejecting("store", _more_passes(store, merged))
            .rejecting(
                "recompute",
                refusal("recompute", workload)
                or "as many passes as merged, and every branch convolved twice",
            )
            .rejecting(
                "resident",
                refusal("resident", workload)
                or "every branch convolved twice, where merged convolves once for all",
            )
        )
    recompute = _worthwhile_recompute(workload)
    others = {
        "resident": _unmeasured_reason(workload),
        "merged": merged if isinstance(merged, str) else _more_passes(merged, store),
    }
    if isinstance(recompute, str):
        taken = store
        others["recompute"] = recompute
    elif recompute.passes >= store.passes:
        taken = store
        others["recompute"] = _more_passes(recompute, store)
    else:
        taken = recompute
        others["store"] = _more_passes(store, recompute)
    for name, reason in others.items():
        taken = taken.rejecting(name, reason)
    return taken


def _more_passes(plan: Plan, other: Plan) -> str:
    """Why `other` is taken before `plan`."""
    return f"{plan.passes:g} passes over memory, against {other.passes:g}"


def _unmeasured_reason(workload: Workload) -> str:
    """Why "resident" is not expected to be the schedule to take."""
    resident = plan_or_refusal("resident", workload)
    if isinstance(resident, str):
        return resident
    chip = workload.chip
    (launch,) = resident.branch_launches
    if has_short_columns(launch.config, launch.shape, chip):
        # Predicted for an A100: 204 µs against 194 in stage 1.
        return f"it fits {chip.name}'s registers with short columns only, whose instructions cost more than a pass"
    # Eight channels a program ask L2 for half sectors: bench/results/h100/units.csv, stage 1.
    return (
        f"{resident.passes:g} passes over memory in one launch, but slower where it was measured (407 µs against 166 "
        "on an H100, 128 samples at 128 @ 56²); sk-triton tune measures it here"
    )


def _worthwhile_recompute(workload: Workload) -> Plan | str:
    """The plan of schedule "recompute" where convolving again is expected to cost less than writing the branches;
    elsewhere, or where it cannot run, the reason."""
    plan = plan_or_refusal("recompute", workload)
    if isinstance(plan, str):
        return plan
    if workload.dtype == torch.float32:
        # 36 to 350 instructions per output: convolving twice costs more than the passes it saves.
        return "in fp32 the convolution is bound by arithmetic, and would run twice"
    if (
        isinstance(plan.branch_launches[0].config, ColumnConfig)
        and workload.spec.branch_in_channels > 16 * workload.spec.branches[0].groups
    ):
        # Predicted for stage 4: 48 µs, against 42 of "store" (`sk-triton explain --gpu h100 --stage 4`).
        return "groups above 16 channels are bound by loading weights, twice as many"
    return plan


user_file.when_changed(fastest_plan.cache_clear)
