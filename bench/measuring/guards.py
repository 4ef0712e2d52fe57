"""What must hold before any speed is claimed. Each guard returns its objections, in words."""

from __future__ import annotations

from dataclasses import replace

from sk_triton.backend import SCHEDULES

from .. import results
from . import clocks

FATAL_THROTTLING = (clocks.THERMAL, clocks.HARDWARE, clocks.POWER_BRAKE)
"""A power cap is a property of the card and falls on everyone alike; it is in the log, but no objection."""
TOLERANCE = 1.1
"""The copy and the product are PyTorch's, which may leave a tenth of the machine unused."""
LIBRARY_FLOP_SHARE = 4.0
"""Libraries may convolve by Winograd's F(4x4, 3x3), in a quarter of the multiplies; merged branches save some too."""
SAVING = ("merged", "library")
"""Schedules that may leave multiplies out."""
WITHOUT_SAVING = tuple(f"triton/{name}" for name in SCHEDULES if name not in SAVING)
"""What executes every multiply that is counted."""


def judged(run: results.Results) -> results.Results:
    """The run with the objections that hold against it."""
    found = (*wrong_results(run), *beyond_ceilings(run), *throttled(run), *red_tests(run))
    return replace(run, objections=found)


def wrong_results(run: results.Results) -> list[str]:
    """Providers whose result was wrong."""
    wrong = [record for record in run.records if record.status == results.WRONG]
    return [f"wrong result: {record.label} in {record.case.title}" for record in wrong]


def beyond_ceilings(run: results.Results) -> list[str]:
    """Times that the machine cannot reach: below the copy of the same rounds, or above the measured matrix rate.

    Below the copy: by more than TOLERANCE, and the bands from the 20 % to the 80 % quantile do not overlap.
    """
    found = []
    for case, records in results.by_case(run.records).items():
        floor = results.floor(records)
        for record in records:
            if record.timing is None or record.role == results.FLOOR:
                continue
            if floor is not None and floor.timing is not None and _is_below(record.timing, floor.timing):
                share = floor.timing.median_ms / record.timing.median_ms
                found.append(f"{share:.0%} of the copy bandwidth: {record.label} in {case.title}")
            share = _matrix_share(run, record)
            if share > TOLERANCE:
                found.append(f"{share:.0%} of the matrix rate: {record.label} in {case.title}")
    return found


def throttled(run: results.Results) -> list[str]:
    """A GPU that was slowed down by heat or by the hardware's protection during the run."""
    for reason in FATAL_THROTTLING:
        hit = [sample for sample in run.clocks if reason in sample.throttle]
        if hit:
            lowest = min(sample.sm_mhz for sample in hit)
            return [f"{reason} in {len(hit)} of {len(run.clocks)} clock readings, down to {lowest} MHz"]
    return []


def red_tests(run: results.Results) -> list[str]:
    """Tests that failed, did not get to their end, or were of another commit than the one measured."""
    tests = run.tests
    if tests is None:
        return []
    if tests.git_commit != run.stamp.git_commit:
        return [f"tests were of commit {tests.git_commit}, the measurements of {run.stamp.git_commit}"]
    if tests.green:
        return []
    end = "" if tests.complete else ", and did not get to the end"
    return [f"{tests.failed} tests failed, {tests.passed} passed{end}: {tests.command}"]


def _is_below(timing: results.Timing, floor: results.Timing) -> bool:
    return timing.q80_ms < floor.q20_ms and timing.median_ms * TOLERANCE < floor.median_ms


def _matrix_share(run: results.Results, record: results.Record) -> float:
    """Rate of a record's convolutions as a share of the measured matrix rate; 0 where there is none to compare with."""
    rate = run.ceilings.matrix_flop_per_s.get(record.case.dtype) if run.ceilings else None
    if not rate or record.timing is None:
        return 0.0
    flops = record.case.flops
    if record.runs not in WITHOUT_SAVING:
        flops /= LIBRARY_FLOP_SHARE
    return flops / (record.timing.median_ms / 1e3) / rate
