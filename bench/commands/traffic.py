"""`sk-triton traffic`: the bytes each kernel asks for and the distinct bytes it touches, counted by interpreting."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from sk_triton.backend import SCHEDULES
from sk_triton.environment import require
from sk_triton.exit_codes import FAILED
from sk_triton.save import SAVES

from ..interpreted.traffic import (
    COUNTED,
    DEFAULT_SAVE,
    STAGES,
    SUMS,
    batch_workload,
    count,
    count_training,
    passes,
)
from ..shapes import CLASSIC, PAPER
from .arguments import bad_usage

TRAIN = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton traffic`."""
    parser.add_argument(
        "--stage", type=int, choices=tuple(STAGES), default=1, help="stage of SKNet-50 (default 1)"
    )
    parser.add_argument(
        "--schedule",
        choices=(*SCHEDULES, TRAIN),
        default="recompute",
        help=f"default: recompute; {TRAIN}: forward and backward",
    )
    parser.add_argument(
        "--unit",
        choices=tuple(COUNTED),
        default=PAPER,
        help=f"default: the paper's; {CLASSIC}: linear branches",
    )
    parser.add_argument("--save", choices=SAVES, help=f"what {TRAIN} saves (default {DEFAULT_SAVE})")


def run(args: argparse.Namespace) -> int:
    """Prints the table of one unit; returns 2 for a schedule that cannot run it, or an option without effect."""
    require("rich", "numpy", "triton")
    from sk_triton import dispatch

    try:
        refuse(args)
    except ValueError as error:
        return bad_usage("traffic", error)
    if not dispatch.is_interpreted():
        return _interpreted(args)
    from rich.console import Console
    from rich.table import Table

    full, spec, n, size = COUNTED[args.unit][args.stage]
    if args.schedule == TRAIN:
        rows, unit = count_training(spec, n, size, full, args.save or DEFAULT_SAVE)
    else:
        rows, unit = count(spec, n, size, full, args.schedule)
    table = Table(
        title=f"Schedule {_title(args)}, {args.unit} unit, stage {args.stage} of SKNet-50, in passes over one "
        "activation tensor (T)"
    )
    for title in ("kernel", "tensor"):
        table.add_column(title)
    for title in ("requested", "distinct"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.kernel, row.tensor, f"{row.requested / unit:.2f}", f"{row.touched / unit:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"activations {passes(rows, unit):.2f} T, sums by tile or sample {passes(rows, unit, SUMS):.2f} T, all "
        "distinct bytes"
    )
    console.print(
        f"counted on {n} sample of {spec.out_channels} of {full.out_channels} channels, as many a group: weights weigh "
        "more than in a batch"
    )
    return 0


def _interpreted(args: argparse.Namespace) -> int:
    """Runs the command in a process of its own: Triton reads the switch when a kernel is defined."""
    options = ("stage", "schedule", "unit", "save")
    given = [f"--{name}={getattr(args, name)}" for name in options if getattr(args, name) is not None]
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "sk_triton", "traffic", *given],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    return done.returncode if done.returncode >= 0 else FAILED  # below 0: a signal ended it


def refuse(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that has no effect, and for a schedule that cannot run the unit."""
    if args.schedule == TRAIN:
        return
    if args.save:
        raise ValueError(f"--save acts on --schedule {TRAIN}, got --schedule {args.schedule}")
    from sk_triton import planning

    full, spec, _, size = COUNTED[args.unit][args.stage]
    for each in (full, spec):
        if reason := planning.refusal(args.schedule, batch_workload(each, size)):
            raise ValueError(
                f"schedule {args.schedule!r} cannot run the {args.unit} unit of stage {args.stage}: {reason}"
            )


def _title(args: argparse.Namespace) -> str:
    return f"{TRAIN}, saving {args.save or DEFAULT_SAVE}" if args.schedule == TRAIN else args.schedule
