"""`sk-triton report`: all that can be known of sk_triton on this machine, step by step, in one folder.

The folder holds a results file for each suite, report.json and report.html, so that it can be committed as it is, as
`bench/results/<gpu>/`.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sk_triton.environment import require
from sk_triton.exit_codes import INTERRUPTED as INTERRUPTED_CODE

from ..problems import in_one_line
from ..report import file as report_file
from ..report.file import FAILED, INTERRUPTED, Report, StepState
from ..report.runs import load_runs
from ..report.steps import STEPS, Context, Ending
from ..stamp import Stamp, take_stamp
from .arguments import bad_usage, choose_device, seed, whole_seconds, writable_folder

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "summary"
STEP_SECONDS = 480


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton report`."""
    parser.add_argument(
        "--step", choices=tuple(STEPS), nargs="+", metavar="NAME", help=f"only these: {', '.join(STEPS)}"
    )
    parser.add_argument("--again", action="store_true", help="run steps that are done already as well")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, default=Path("sk-triton-report"), metavar="DIR", help="folder of the report"
    )
    parser.add_argument(
        "--time-limit",
        type=whole_seconds,
        default=STEP_SECONDS,
        metavar="SECONDS",
        help=f"for each step (default {STEP_SECONDS}); what is left is for the next run",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights and inputs (default 0)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if a step or a provider failed or a guard objects, 2 for bad usage, 130 if interrupted.

    Raises:
        MissingPackageError: rich, matplotlib or scikit-learn is not installed.
    """
    require("rich", "matplotlib", "sklearn")
    from rich.console import Console

    console = Console()
    try:
        device = choose_device(args.device)
        steps = choose_steps(args.step, on_gpu=device.type == "cuda")
        writable_folder(args.output)
        report = report_file.load(args.output) or Report(seed=args.seed)
        _refuse_mixing(report, take_stamp(device), args)
        if not args.again:  # which may replace a file that cannot be read
            load_runs(args.output)
    except (ValueError, OSError) as error:
        return bad_usage("report", error)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    report.seed = args.seed
    context = Context(args.output, device, report, console, args.time_limit, args.again)
    failed = False
    for index, name in enumerate(steps):
        if name != SUMMARY and not args.again and report.is_done(name, take_stamp(device)):
            console.print(f"[{index + 1}/{len(steps)}] {name}: done already", markup=False)
            continue
        minutes = sum(min(STEPS[later].minutes, args.time_limit / 60) for later in steps[index:])
        console.rule(f"{index + 1}/{len(steps)} {name}, about {minutes:.0f} min left", style="bold")
        try:
            failed |= _run_step(name, context)
        except KeyboardInterrupt:
            console.print("interrupted; what was measured is kept, the next run goes on", style="yellow")
            return INTERRUPTED_CODE
    console.print(f"\nreport  {args.output}", markup=False, soft_wrap=True)
    try:
        return int(failed or any(run.exit_code for run in load_runs(args.output)))
    except ValueError as error:
        return bad_usage("report", error)


def choose_steps(wanted: Sequence[str] | None, on_gpu: bool) -> list[str]:
    """The steps to run, in their order. Raises ValueError for one that has no place on this machine."""
    possible = [name for name, step in STEPS.items() if (step.with_gpu if on_gpu else step.without_gpu)]
    for name in wanted or ():
        if name not in possible:
            where = "a machine without a GPU" if on_gpu else "a GPU"
            raise ValueError(f"--step {name} is for {where}; here run {', '.join(possible)}")
    return [name for name in possible if not wanted or name in wanted]


def _refuse_mixing(report: Report, stamp: Stamp, args: argparse.Namespace) -> None:
    """Raises ValueError where new measurements would replace those of another machine, version or seed."""
    before = report.stamp
    if before is None or args.again or set(args.step or ()) == {SUMMARY}:
        return
    differing = before.changes(stamp)
    differing += [f"seed {report.seed}, now {args.seed}"] if report.seed != args.seed else []
    if differing:
        raise ValueError(
            f"{args.output} was measured under another setting ({'; '.join(differing)}): take another --output, "
            "or --again to replace it"
        )


def _run_step(name: str, context: Context) -> bool:
    """Runs a step and writes down how it ended; whether it failed."""
    stamp, start = take_stamp(context.device), time.monotonic()
    if name == SUMMARY:  # may be drawn on another machine than was measured
        stamp = context.report.stamp or stamp
    ending = Ending(INTERRUPTED)
    try:
        ending = STEPS[name].run(context)
    except Exception as error:  # one step's failure must not cost the others
        ending = Ending(FAILED, in_one_line(error))
    finally:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        seconds = round(time.monotonic() - start, 1)
        context.report.steps[name] = StepState(ending.status, date, seconds, stamp, ending.message)
        report_file.save(context.report, context.folder)
    _tell(name, ending, seconds, context.console)
    return ending.status == FAILED


def _tell(name: str, ending: Ending, seconds: float, console: Console) -> None:
    message = f": {ending.message}" if ending.message else ""
    console.print(
        f"{name} {ending.status} in {seconds:.0f} s{message}", markup=False, style="bold", soft_wrap=True
    )
