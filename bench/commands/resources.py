"""`sk-triton resources`: what every kernel of the support grid uses on every chip, as a table; ships configs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sk_triton.chips import CHIPS, is_amd
from sk_triton.environment import require

from ..compiled import training_resources
from ..compiled.resources import Row, compilable_chips, measure, measure_all
from ..compiled.shipping import measure_analytic, write_configs
from ..grid import CASES, GRID_UNITS, PRECISIONS, GridCase
from .arguments import bad_usage, positive

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..compiled.compile import Resources

WIDTH = 220
"""Columns of the table where no terminal says how many there are, so that a row is a line."""
LATENCIES = (400, 1400)
"""Clocks that a load takes from L2, and from memory while others load as well: with the latter the loops that pool,
select and convolve by merged weights came out within 9 % of what an H100 took."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton resources`."""
    names = [name for name, *_ in GRID_UNITS]
    parser.add_argument(
        "--chip",
        choices=tuple(CHIPS),
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(CHIPS)} (default: all that Triton compiles for)",
    )
    parser.add_argument(
        "--unit",
        choices=names,
        nargs="+",
        metavar="NAME",
        help=f"of the support grid (default: all): {'; '.join(names)}",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(PRECISIONS),
        nargs="+",
        default=["fp16"],
        help="default: fp16",
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="the kernels of a training step, under both save policies, instead of inference's",
    )
    parser.add_argument(
        "--clocks",
        action="store_true",
        help="clocks a trip of each kernel's longest loop, simulated from the machine code of sm_90: of one warp "
        "alone, of the products of all warps of a scheduler, and of these warps with loads of "
        f"{' and '.join(map(str, LATENCIES))} clocks",
    )
    parser.add_argument(
        "--write-configs",
        action="store_true",
        help="ship the analytic configs of what is compiled here",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", default=2, help="compiling processes (default 2)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if a kernel spills, exceeds shared memory or misses the tensor cores, 2 for options
    that exclude each other."""
    require("rich")
    if args.training and args.write_configs:
        return bad_usage(
            "resources",
            "--write-configs does not act on --training: what is shipped are configs of inference",
        )
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    rows = _compiled(args, console)
    console.print(_table(rows, args.clocks))
    if args.write_configs:
        write_configs(rows)
    faults = [row for row in rows if row.faults]
    console.print(f"{len(rows)} kernels, {len(faults)} with faults")
    return 1 if faults else 0


def _compiled(args: argparse.Namespace, console: Console) -> list[Row]:
    """A row for each kernel of the cases that the options ask for, chip by chip."""
    from ..progress import case_progress

    cases = [
        case for case in CASES if case.precision in args.dtype and (not args.unit or case.name in args.unit)
    ]
    chosen: Callable[[GridCase, str], list[Row]] = measure_analytic if args.write_configs else measure
    if args.training:
        chosen = training_resources.measure
    jobs = [
        partial(chosen, case, chip)
        for chip in args.chip or compilable_chips()
        for case in cases
        if not (case.allow_tf32 and is_amd(chip))  # which PyTorch's switch never allows there
    ]
    rows: list[Row] = []
    with case_progress(console, len(jobs)) as report:
        for done, found in enumerate(measure_all(jobs, args.workers), 1):
            rows.extend(found)
            report(done, "compiling", 0.0)
    return rows


def _table(rows: list[Row], with_clocks: bool) -> Table:
    from rich.table import Table

    table = Table(title="Resources of the compiled kernels")
    for title in ("chip", "unit", "kernel", "precision"):
        table.add_column(title)
    clock_titles = ("alone", "products", *(f"loads {latency}" for latency in LATENCIES))
    for title in (
        *("registers", "spills", "shared", "16-byte loads", "matrix", "instr / output"),
        *(clock_titles if with_clocks else ()),
    ):
        table.add_column(title, justify="right")
    table.add_column("fault", style="red")
    for row in rows:
        used = row.resources
        table.add_row(
            used.target,
            row.case.name,
            row.kernel,
            row.case.precision,
            str(used.registers),
            str(used.spills),
            str(used.shared),
            f"{used.wide_loads}/{used.loads}",
            str(used.matrix),
            "-" if row.per_output is None or is_amd(used.target) else f"{row.per_output:.1f}",
            *(clocks_of(used) if with_clocks else ()),
            ", ".join(row.faults),
        )
    return table


def clocks_of(used: Resources) -> list[str]:
    """What `--clocks` adds to a kernel's row."""
    from ..compiled.warps import TARGETS, clocks_per_trip, product_clocks, resident_warps

    if not used.loop or used.target not in TARGETS:
        return ["-"] * (2 + len(LATENCIES))
    warps = resident_warps(used.registers)
    found = [sum(step.stall for step in used.loop), warps * product_clocks(used.loop, used.target)]
    found += [round(clocks_per_trip(used.loop, used.target, warps, latency)) for latency in LATENCIES]
    return list(map(str, found))
