"""`sk-triton resources`: what every kernel of the support grid uses on every chip, from the compiled code alone."""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sk_triton import dispatch, plans
from sk_triton.backend import SCHEDULES, Schedule
from sk_triton.chips import CHIPS
from sk_triton.environment import installed_triton, require
from sk_triton.kernels.launch import Launch, flat
from sk_triton.plan import BranchLaunch, Plan
from sk_triton.tuning import shipped
from sk_triton.tuning.launches import branch_key
from sk_triton.workload import Workload

from .arguments import positive
from .grid import CASES, UNITS, Case
from .phases import counted, has_phases
from .planned import planned_steps
from .processes import compiling_processes

if TYPE_CHECKING:
    from .compile import Resources


MATRIX_KERNELS = (
    *(
        "branch_conv_stream",
        "branch_conv_window",
        "branch_conv_column",
        "branch_conv_held",
        "branch_conv_tap",
    ),
    *("merged_conv", "unit_resident"),
    *("branch_grad_stream", "branch_grad_data", "branch_grad_weight"),
)
"""What is meant to use tensor cores, or what its name starts with."""
GATES = ("gate", "gated_select")
"""Those of inference, by their whole names: training's use no tensor cores. In fp32 units their products are IEEE."""
WIDTH = 220
"""Columns of the table where no terminal says how many there are, so that a row is a line."""
LATENCIES = (400, 1400)
"""Clocks that a load takes from L2, and from memory while others load as well: with the latter the loops that pool,
select and convolve by merged weights came out within 9 % of what an H100 took."""


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one chip.

    `per_output`: thread-instructions per element of the branches that the launch computes, waste at the edges included;
    None where the compiler unrolled loops so that they cannot be counted, and for the gate.
    """

    case: Case
    kernel: str
    config: str
    resources: Resources
    per_output: float | None
    branch_launch: BranchLaunch | None

    @property
    def faults(self) -> list[str]:
        """What a kernel must not do: spill, exceed shared memory, or miss the tensor cores it is meant to use."""
        found = self.resources.excesses
        # fp32 units take the tensor cores only in the branches, only where TF32 is allowed, and never depthwise.
        precision = (
            "fp32" if self.kernel in GATES and self.case.dtype == torch.float32 else self.case.precision
        )
        is_meant_to = self.kernel in GATES or self.kernel.startswith(MATRIX_KERNELS)
        uses_matrix = is_meant_to and precision != "fp32"
        if uses_matrix and not self.resources.matrix:
            found.append("no tensor-core instruction")
        return found


def launches(case: Case, target: str, schedule: Schedule = "store") -> tuple[Plan, list[Launch]]:
    """The plan and the kernel launches of `case` under a schedule on chip `target`, on meta tensors.

    Raises:
        RuntimeError: the schedule cannot run the case.
    """
    plan, steps, _ = planned_steps(schedule, workload_of(case, target))
    return plan, [step for step in steps if isinstance(step, Launch)]


def workload_of(case: Case, target: str) -> Workload:
    return Workload(case.spec, case.n, case.size, case.size, case.dtype, CHIPS[target], case.allow_tf32)


def measure(
    case: Case, target: str, *, with_phases: bool = True, without: Sequence[Schedule] = ()
) -> list[Row]:
    """Compile the case's kernels for `target`, those of every schedule that can run it, and read what they use.

    `with_phases`: the phases of a kernel that has any are compiled once more each, to count its instructions.
    `without`: schedules to leave out.
    """
    from .compile import compile_launch

    rows: list[Row] = []
    measured: list[Launch] = []
    height, width = case.spec.output_size(case.size, case.size)
    outputs = case.n * height * width * case.spec.out_channels
    planned = [
        (launch, plan.branch_launches[i] if i < len(plan.branch_launches) else None)
        for plan, found in (
            launches(case, target, name) for name in schedules(case, target) if name not in without
        )
        for i, launch in enumerate(_branches_first(found))
    ]
    for launch, branch_launch in planned:
        if has_phases(launch):
            compiled = functools.partial(compile_launch, target=target)
            used = counted(launch, compiled) if with_phases else compiled(launch)
            branch_launch = None  # its config is no branch kernel's
        elif kernel_name(launch) == "gate" and any(row.kernel == "gate" for row in rows):
            continue  # every schedule's gate is the same
        elif any(launch.kernel is other.kernel and _code(launch) == _code(other) for other in measured):
            continue
        else:
            used = compile_launch(launch, target)
        measured.append(launch)
        computed = outputs * len(launch.constexprs.get("KERNELS", (1,)))
        rows.append(row_of(case, launch, used, computed, branch_launch))
    return rows


def _code(launch: Launch) -> tuple[Any, ...]:
    """What tells one compilation of a kernel from another: launches of which it is equal compile alike."""
    kinds = [getattr(argument, "dtype", argument) for argument in flat(launch.arguments)]
    return kinds, launch.constexprs, launch.options, launch.trips


def kernel_name(launch: Launch) -> str:
    """The name of a launch's kernel, with the task if it has several."""
    name = launch.kernel.fn.__name__.removesuffix("_kernel").removesuffix("_fwd")
    task = launch.constexprs.get("TASK", "store")
    return name if task == "store" else f"{name}, {task}"


def row_of(
    case: Case, launch: Launch, used: Resources, computed: int, branch_launch: BranchLaunch | None = None
) -> Row:
    """The row of a launch that computes as many elements of the branches, or of the output, as `computed` says."""
    name, per_output = kernel_name(launch), None
    if used.instructions is not None and name not in GATES:
        per_output = used.instructions * used.threads * torch.Size(launch.grid).numel() / computed
    sizes = {k: v for k, v in launch.constexprs.items() if k.startswith(("BLOCK", "RUN"))}
    config = " ".join(f"{k}={v}" for k, v in sizes.items()) + f" num_warps={launch.options['num_warps']}"
    return Row(case, name, config, used, per_output, branch_launch)


def schedules(case: Case, target: str) -> list[Schedule]:
    """The schedules that can run a case."""
    return [name for name in SCHEDULES if not plans.refusal(name, workload_of(case, target))]


def _branches_first(found: list[Launch]) -> list[Launch]:
    """Launches with those of the plan's branches first, in their order."""
    return sorted(found, key=lambda launch: "KERNELS" not in launch.constexprs)


def measure_all(
    pairs: Sequence[tuple[Case, str]],
    workers: int,
    measure: Callable[[Case, str], list[Row]] = measure,
) -> Iterator[list[Row]]:
    """`measure` for every case and target, in order, in `workers` new processes, where kernels are compiled, not
    interpreted."""
    with compiling_processes(workers) as pool:
        yield from pool.map(measure, *zip(*pairs, strict=True))


def compilable_chips() -> list[str]:
    """The chips that the installed Triton compiles for: gfx942 from 3.5 on."""
    return [name for name in CHIPS if not name.startswith("gfx") or dispatch.triton_version() >= (3, 5)]


def write_configs(rows: list[Row]) -> None:
    """Put the configs of the branch launches in `rows` that have no fault into their chips' shipped files.

    Entries for other launches stay if they were made for the kernels as they are.
    """
    by_chip = {row.resources.target: dict(shipped.shipped(row.resources.target)) for row in rows}
    for row in rows:
        if row.branch_launch is not None and not row.faults:
            case, launch = row.case, row.branch_launch
            key = branch_key(workload_of(case, row.resources.target), launch.shape, launch.task)
            by_chip[row.resources.target][key] = launch.config
    for chip, entries in by_chip.items():
        content = json.dumps(shipped.shipped_content(chip, entries, installed_triton() or "none"), indent=1)
        shipped.shipped_file(chip).write_text(content + "\n")


def clocks_of(used: Resources) -> list[str]:
    """What `--clocks` adds to a kernel's row."""
    from .warps import PRODUCT_CLOCKS, clocks_per_trip, product_clocks, resident_warps

    if not used.loop or used.target not in PRODUCT_CLOCKS:
        return ["-"] * (2 + len(LATENCIES))
    warps = resident_warps(used.registers)
    found = [sum(step.stall for step in used.loop), warps * product_clocks(used.loop, used.target)]
    found += [round(clocks_per_trip(used.loop, used.target, warps, latency)) for latency in LATENCIES]
    return list(map(str, found))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton resources`."""
    parser.add_argument(
        "--chip", choices=tuple(CHIPS), nargs="+", help="chips (default: all that Triton compiles for)"
    )
    parser.add_argument(
        "--unit",
        choices=[name for name, *_ in UNITS],
        nargs="+",
        help="units of the support grid (default: all)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp16", "bf16", "tf32", "fp32"),
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
    """Prints the table; returns 1 if a kernel spills, exceeds shared memory or misses the tensor cores."""
    require("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from . import training_resources

    cases = [
        case
        for case in CASES
        if case.precision in args.precision and (not args.unit or case.name in args.unit)
    ]
    chips = args.chip or compilable_chips()
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=len(cases) * len(chips))
        chosen = training_resources.measure if args.training else measure
        for found in measure_all([(case, chip) for chip in chips for case in cases], args.workers, chosen):
            rows.extend(found)
            progress.advance(task)

    table = Table(title="Resources of the compiled kernels")
    for title in ("chip", "unit", "kernel", "precision"):
        table.add_column(title)
    for title in ("registers", "spills", "shared", "16-byte loads", "matrix", "instr / output"):
        table.add_column(title, justify="right")
    clock_titles = (
        ("alone", "products", *(f"loads {latency}" for latency in LATENCIES)) if args.clocks else ()
    )
    for title in clock_titles:
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
            "-" if row.per_output is None or used.target.startswith("gfx") else f"{row.per_output:.1f}",
            *(clocks_of(used) if args.clocks else ()),
            ", ".join(row.faults),
        )
    console.print(table)
    if args.write_configs:
        write_configs(rows)
    faults = [row for row in rows if row.faults]
    console.print(f"{len(rows)} kernels, {len(faults)} with faults")
    return 1 if faults else 0
