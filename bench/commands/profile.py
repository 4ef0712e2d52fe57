"""`sk-triton profile`: a unit's kernels one by one, on this GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sk_triton.backend import SCHEDULES
from sk_triton.environment import require
from sk_triton.exit_codes import FAILED

from ..shapes import CLASSIC, PAPER, STAGES, Case, stage_shape
from ..unit_times import EAGER, SUITE
from .arguments import (
    DTYPE_NAMES,
    add_direction,
    bad_usage,
    choose_device,
    directions_of,
    positive,
    writable_folder,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..measuring.kernel_times import CallTimes

AUTO = "auto"
UNKNOWN_COMMIT, DIRTY = "unknown", "-dirty"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton profile`."""
    parser.add_argument(
        "--stage",
        type=int,
        choices=tuple(STAGES),
        nargs="+",
        default=list(STAGES),
        help="stages of SKNet-50: 128@56² is 1 (default: all)",
    )
    parser.add_argument(
        "--unit", choices=(PAPER, CLASSIC), nargs="+", default=[PAPER, CLASSIC], help="default: both"
    )
    add_direction(parser)
    parser.add_argument(
        "--schedule",
        choices=(AUTO, EAGER, *SCHEDULES),
        nargs="+",
        default=[AUTO],
        metavar="NAME",
        help=f"what runs them (default {AUTO}): {', '.join(SCHEDULES)}, or {EAGER}: PyTorch, operator by operator",
    )
    parser.add_argument("--batch", type=positive, default=128, metavar="N", help="samples (default 128)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp16", help="default: fp16")
    parser.add_argument("--device", default="auto", help="auto (default), cuda or cuda:N")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="append to units.csv and launches.csv in this folder (default: only print)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if a unit could not be measured, 2 for bad usage.

    Raises:
        MissingPackageError: rich or triton is not installed.
    """
    require("rich", "triton")
    from rich.console import Console

    from ..stamp import take_stamp

    console = Console()
    try:
        device = choose_device(args.device)
        if device.type != "cuda":
            raise ValueError(f"--device must be a GPU, whose kernels can be timed, got {str(device)!r}")
        if args.output:
            writable_folder(args.output)
    except ValueError as error:
        return bad_usage("profile", error)
    torch.cuda.set_device(device)
    stamp = take_stamp(device)
    commit = (stamp.git_commit or UNKNOWN_COMMIT)[:9] + (DIRTY if stamp.git_dirty else "")
    failed = False
    for case in cases(args):
        for schedule in args.schedule:
            failed |= not _measure_one(case, schedule, device, commit, args.output, console)
    return FAILED if failed else 0


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command's options ask for, stage by stage."""
    return [
        Case(SUITE, unit, stage_shape(unit, stage), args.batch, args.dtype, direction)
        for direction in directions_of(args)
        for stage in args.stage
        for unit in args.unit
    ]


def _measure_one(
    case: Case, schedule: str, device: torch.device, commit: str, folder: Path | None, console: Console
) -> bool:
    """Whether it could be measured."""
    from ..measuring.kernel_times import append, measure
    from ..measuring.protocol import failure

    try:
        name, times = measure(case, schedule, device)
    except Exception as error:
        status, message = failure(error)
        console.print(f"{case.title}, {schedule}: {status}: {message}", markup=False, soft_wrap=True)
        return False
    show(case, name, times, console)
    if folder:
        append(folder, commit, case, name, times)
    return True


def show(case: Case, schedule: str, times: CallTimes, console: Console) -> None:
    """One line for the call, one for each of its kernels."""
    console.print(
        f"{case.title}, {schedule}: {times.total:.1f} µs in {len(times.kernels)} kernels, {times.span:.1f} µs from the "
        "first to the last",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name, duration in times.kernels:
        console.print(f"  {duration:9.2f}  {name}", markup=False, highlight=False, soft_wrap=True)
