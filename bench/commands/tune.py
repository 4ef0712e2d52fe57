"""`sk-triton tune`: measures the configs and the schedule of units on this GPU, and keeps what is faster."""

from __future__ import annotations

import argparse
import os
import re
import time
from typing import TYPE_CHECKING

import torch

from sk_triton import dispatch
from sk_triton.environment import require
from sk_triton.exit_codes import BAD_USAGE, INTERRUPTED
from sk_triton.tuning import user_file

from ..grid import PRECISIONS
from ..model.gpus import Gpu, refuse_precision
from ..model.speed_of_light import Problem
from ..progress import case_progress
from ..shapes import NETWORKS
from ..tuning import tables
from ..tuning.flow import LEFT, Outcome
from ..tuning.ranking import failures, rank
from ..tuning.session import BUDGET_SECONDS, INTERRUPT, TuneRequest, present, product, tune_here
from ..tuning.targets import Target, refusal, targets_of
from ..tuning.units import network_problems, title
from .arguments import WEEK_SECONDS, add_direction, bad_usage, choose_device, directions_of, positive
from .unit_arguments import add_unit_arguments, batch_of, problem_of, refuse_unit_options

if TYPE_CHECKING:
    from rich.console import Console

CANDIDATES, DRY_CANDIDATES = 6, 3
DRY_BUDGET_SECONDS = 100.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton tune`."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--model",
        choices=tuple(NETWORKS),
        help="all units of a network, at 224 x 224 pixels; refuses options that describe a unit",
    )
    add_unit_arguments(parser, subject)
    add_direction(parser)
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="60s, 5m: nothing is begun after this; what is left is for the next run (default 5m, in a dry run 100s)",
    )
    parser.add_argument("--again", action="store_true", help="measure anew what was tuned before")
    parser.add_argument("--device", help="auto (default), cuda or cuda:N")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list, compile and rank the candidates by prediction; run nothing",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="with --dry-run: h100, a100, … instead of this machine's"
    )
    parser.add_argument(
        "--candidates",
        type=positive,
        metavar="N",
        help=f"per launch (default {CANDIDATES}, in a dry run {DRY_CANDIDATES})",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        default=_cores(),
        help="compiling processes (default: one per core, at most 16)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if something could not be tuned, 2 for bad usage, 130 if interrupted.

    Raises:
        MissingPackageError: rich or triton is not installed, or what the model needs.
    """
    require("rich", "triton")
    from rich.console import Console

    console = Console()
    try:
        _refuse(args)
        device = None if args.gpu else _gpu_device(args)
        chip, gpu = product(args.gpu) if device is None else present(device)
        refuse_precision(gpu, args.dtype)
        problems = _problems(args)
        user_file.path()  # not to find out after the measurements
    except (ValueError, OSError) as error:
        return bad_usage("tune", error)
    limit = args.candidates or (DRY_CANDIDATES if args.dry_run else CANDIDATES)
    by_key: dict[str, Target] = {}
    for direction in directions_of(args):
        for problem in problems:
            if reason := refusal(problem.on(chip), direction):
                console.print(
                    f"{title(problem)}: not tuned for {direction}: {reason}", markup=False, highlight=False
                )
            for target in targets_of(title(problem), problem.on(chip), limit, direction):
                by_key.setdefault(target.key, target)  # units may share a launch: a gate of the same size
    targets = list(by_key.values())
    if not targets:
        return BAD_USAGE
    if device is None or args.dry_run:
        return dry_run(targets, gpu, args.budget or DRY_BUDGET_SECONDS, args.workers, console)
    request = TuneRequest(device, chip, gpu, args.budget or BUDGET_SECONDS, args.again, args.workers)
    outcomes, trouble = tune_here(targets, request, console)
    show(outcomes, console)
    left = sum(outcome.note == LEFT for outcome in outcomes)
    if left:  # in a line of its own, which the report looks for: a cell of the table may wrap
        console.print(f"{left} targets {LEFT}", markup=False, highlight=False, soft_wrap=True)
    if trouble:
        console.print(trouble, style="yellow", markup=False, soft_wrap=True)
    if trouble == INTERRUPT:
        return INTERRUPTED
    return int(bool(trouble) or any(o.entry is None and o.note != LEFT for o in outcomes))


def dry_run(targets: list[Target], gpu: Gpu, seconds: float, workers: int, console: Console) -> int:
    """Compiles and ranks the candidates of each target; returns 1 if an analytic choice is out."""
    start = time.monotonic()
    candidates = sum(len(target.choices) for target in targets)
    with case_progress(console, candidates) as report:
        ranked = rank(
            targets,
            gpu,
            seconds,
            workers,
            lambda done, target: report(done, f"{target.unit}: {target.kind}", 0.0),
        )
    for target in targets:
        console.print(tables.predicted(target, ranked[target.key]))
    console.print(
        f"{tables.ranking(targets, ranked)}, for {gpu.name} in {time.monotonic() - start:.0f} s. Predicted, not "
        "measured: bounds from below, which leave latency out.",
        markup=False,
        highlight=False,
    )
    return int(failures(targets, ranked) > 0)


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints what was gained, and how well it was predicted."""
    console.print(tables.gained(outcomes))
    for line in tables.correlations(outcomes):
        console.print(line, markup=False, highlight=False)
    console.print(f"kept in {user_file.path()}", markup=False, highlight=False, soft_wrap=True)


def _refuse(args: argparse.Namespace) -> None:
    if args.gpu and not args.dry_run:
        raise ValueError("--gpu is for --dry-run: only the GPU of this machine can be measured")
    if args.gpu and args.device:
        raise ValueError(f"--device does not act on --gpu {args.gpu}, which need not be here")
    if args.again and args.dry_run:
        raise ValueError(
            "--again does not act on --dry-run, which measures nothing and looks at no earlier entry"
        )
    if args.model:
        refuse_unit_options(args, f"--model {args.model}")


def _gpu_device(args: argparse.Namespace) -> torch.device:
    device = choose_device(args.device or "auto")
    if device.type != "cuda":
        raise ValueError("there is no GPU here to tune on; --dry-run --gpu h100 ranks candidates for one")
    if dispatch.is_interpreted():
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels tell no times")
    torch.cuda.set_device(device)
    return device


def _problems(args: argparse.Namespace) -> list[Problem]:
    if args.model:
        return network_problems(args.model, batch_of(args), *PRECISIONS[args.dtype])
    return [problem_of(args)]


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores or 1)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m)?", text)
    seconds = float(found[1]) * (60 if found[2] == "m" else 1) if found else 0.0
    if not 0 < seconds <= WEEK_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a time such as 60s or 5m, a week at most, got {text!r}")
    return seconds
