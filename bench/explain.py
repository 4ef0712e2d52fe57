"""`sk-triton explain`: what each schedule takes on a GPU that need not be present, what bounds it, which is chosen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from sk_triton import plans
from sk_triton.chips import CHIPS, Chip
from sk_triton.environment import require

from . import speed_of_light as sol
from .gpus import Gpu, find_gpu
from .grid import paper_unit
from .shapes import GROUPS, PAPER, SEED, STAGES
from .speed_of_light import Prediction, Problem
from .validation import PRECISIONS, Compared, committed, compare, rank_correlation, unit_spec

BAD_USAGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton explain`."""
    parser.add_argument("--gpu", required=True, help="h100, a100, rtx4090, … or a device's full name")
    add_unit_arguments(parser, parser.add_mutually_exclusive_group(required=True))
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_unit_arguments(parser: argparse.ArgumentParser, subject: Any) -> None:
    """The options that describe a unit and its input, as :func:`problem_of` reads them; `subject`: their group."""
    subject.add_argument("--shape", type=_shape, metavar="N,C,H,W", help="of the input")
    subject.add_argument("--stage", type=int, choices=tuple(STAGES), help="stage of SKNet-50 instead")
    parser.add_argument(
        "--batch", type=int, default=128, help="samples, where no --shape says it (default 128)"
    )
    parser.add_argument("--unit", choices=(PAPER, SEED), default=PAPER, help="default: the paper's")
    parser.add_argument("--groups", type=int, default=GROUPS, help=f"default {GROUPS}")
    parser.add_argument(
        "--kernels", type=int, nargs="+", help="per branch (default: 3 3; the seed's unit: 3 5)"
    )
    parser.add_argument(
        "--dilations", type=int, nargs="+", help="per branch (default: 1 2; the seed's unit: 1 1)"
    )
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="fp16", help="default: fp16")


def run(args: argparse.Namespace) -> int:
    """Prints the predictions; returns 2 for a GPU or a unit that is not known."""
    require("rich", "triton")
    try:
        gpu = find_gpu(args.gpu)
        problem = problem_of(args)
        predictions = sol.predict_all([problem], gpu)[0]
        compared = compare(committed(gpu, args.unit, args.dtype), gpu, args.dtype)
    except ValueError as error:
        print(f"sk-triton explain: {error}", file=sys.stderr)
        return BAD_USAGE
    if args.json:
        print(json.dumps(as_json(problem, gpu, predictions, compared), indent=1))
        return 0
    show(problem, gpu, predictions, compared)
    return 0


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem that the command's options describe.

    Raises:
        ValueError: kernels and dilations of different numbers, or a unit that `SKSpec` refuses.
    """
    if args.stage:
        channels, size = STAGES[args.stage]
        shape = (args.batch, channels, size, size)
    else:
        shape = args.shape
    if min(shape) < 1:
        raise ValueError(f"shape must be four positive sizes N,C,H,W, got {','.join(map(str, shape))}")
    defaults = ([3, 3], [1, 2]) if args.unit == PAPER else ([3, 5], [1, 1])
    kernels, dilations = args.kernels or defaults[0], args.dilations or defaults[1]
    if len(kernels) != len(dilations):
        raise ValueError(
            f"kernels and dilations must be as many as there are branches, got {len(kernels)} and {len(dilations)}"
        )
    spec = unit_spec(args.unit, shape[1], args.groups, kernels, dilations)
    return Problem(spec, shape[0], *shape[2:], *PRECISIONS[args.dtype])


def choice(problem: Problem, predictions: list[Prediction], chip: Chip) -> tuple[str, str]:
    """(what "auto" runs, why): the dispatcher's own choice, beside the predictions."""
    chosen = plans.fastest_plan(problem.on(chip)).schedule
    by_name = {prediction.schedule: prediction for prediction in predictions}
    others = ", ".join(f"{name} {_us(p.total)}" for name, p in by_name.items() if name != chosen)
    return chosen, f"predicted {_us(by_name[chosen].total)} µs, bound by {by_name[chosen].bound}; {others}"


def predicted_markdown(gpu: str = "H100 SXM", batch: int = 128) -> str:
    """The README's table of what is known without a GPU: SKNet-50's stages in fp16, as "auto" runs them.

    Raises:
        ValueError: the GPU is unknown.
    """
    product = find_gpu(gpu)
    problems = [Problem(paper_unit(c), batch, size, size, torch.float16) for c, size in STAGES.values()]
    lines = [
        "| stage | schedule | passes | convolution, instructions per output | memory | L2 | issue slots | **unit** | "
        "bound by | eager, by its passes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for problem, predictions in zip(problems, sol.predict_all(problems, product), strict=True):
        by_name = {prediction.schedule: prediction for prediction in predictions}
        chosen = by_name[choice(problem, predictions, CHIPS[product.chip])[0]]
        counts = [
            step.work.warp_instructions * product.warp / problem.outputs / problem.spec.num_branches
            for step in chosen.steps
            if step.work.name.startswith(("branch_conv", "unit")) and step.work.warp_instructions is not None
        ]
        times = [f"{_us(chosen.seconds(bound))} µs" for bound in (sol.MEMORY, sol.L2, sol.ISSUE)]
        cells = [
            f"{problem.spec.in_channels} @ {problem.height}²",
            chosen.schedule,
            f"{chosen.memory_bytes / problem.tensor_bytes:.2f} T",
            " + ".join(f"{count:.1f}" for count in counts),
            *times,
            f"**{_us(chosen.total)} µs**",
            chosen.bound,
            f"{_us(by_name[sol.EAGER].total)} µs",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_json(
    problem: Problem, gpu: Gpu, predictions: list[Prediction], compared: list[Compared]
) -> dict[str, Any]:
    """Everything the command knows, times in microseconds."""
    chosen, reason = choice(problem, predictions, CHIPS[gpu.chip])
    return {
        "gpu": gpu.name,
        "chip": gpu.chip,
        "sources": gpu.sources,
        "shape": [problem.n, problem.spec.in_channels, problem.height, problem.width],
        "dtype": str(problem.dtype).removeprefix("torch."),
        "branches": [str(branch) for branch in problem.spec.branches],
        "choice": {"schedule": chosen, "reason": reason},
        "schedules": [
            {
                "schedule": prediction.schedule,
                "total_us": prediction.total * 1e6,
                "bound": prediction.bound,
                "passes": prediction.memory_bytes / problem.tensor_bytes,
                "bounds_us": {b: _microseconds(prediction.seconds(b)) for b in sol.BOUNDS},
                "configs": [
                    {"config": str(config), "source": str(source)} for config, source in prediction.configs
                ],
                "steps": [
                    {
                        "name": step.work.name,
                        "total_us": step.total * 1e6,
                        "bound": step.bound,
                        "bounds_us": {b: _microseconds(step.seconds[b]) for b in sol.BOUNDS},
                        "programs": step.work.programs,
                        "resident_warps": step.resident_warps,
                        "waves": step.waves,
                        "loops_counted": step.work.is_counted,
                    }
                    for step in prediction.steps
                ],
            }
            for prediction in predictions
        ],
        "measured": [dataclasses.asdict(found) for found in compared] or "not measured",
        "rank_correlation": rank_correlation(compared),
    }


def show(problem: Problem, gpu: Gpu, predictions: list[Prediction], compared: list[Compared]) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    spec = problem.spec
    table = Table(
        title=f"Predicted for {gpu.name} ({gpu.chip}), in µs: {problem.n} x {spec.in_channels} x {problem.height} x "
        f"{problem.width}, {', '.join(map(str, spec.branches))}"
    )
    table.add_column("schedule")
    for title in (*sol.BOUNDS, "warps", "total"):
        table.add_column(title, justify="right")
    table.add_column("bound by")
    for prediction in predictions:
        table.add_section()
        bounds = [_us(prediction.seconds(bound)) for bound in sol.BOUNDS]
        table.add_row(prediction.schedule, *bounds, "", _us(prediction.total), prediction.bound, style="bold")
        for step in prediction.steps if prediction.is_ours else ():
            mark = "" if step.work.is_counted else "≥"
            cells = [
                # Memory is known from the tensors; what the code says is short of its uncounted loops.
                ("" if bound == sol.MEMORY or step.seconds[bound] is None else mark)
                + _us(step.seconds[bound])
                for bound in sol.BOUNDS
            ]
            warps = f"{step.resident_warps}/{gpu.threads // gpu.warp}" if step.work.programs else ""
            table.add_row(f"  {step.work.name}", *cells, warps, mark + _us(step.total), step.bound)
    console.print(table)
    console.print(
        f"Each launch takes its largest bound and {_us(gpu.launch_seconds)} µs to start; warps: resident on a "
        "processor, of those that fit. ≥: loops that the compiler unrolled count once. Latency is not modelled: "
        "these are bounds, not measurements.\n"
    )
    for prediction in predictions:
        for config, source in prediction.configs:
            console.print(f"{prediction.schedule}: {config}, from {source}", markup=False, highlight=False)
    chosen, reason = choice(problem, predictions, CHIPS[gpu.chip])
    console.print(f"choice: {chosen}: {reason}", markup=False, highlight=False)
    if not compared:
        console.print(f"not measured: no results of {gpu.name} are committed")
        return
    table = Table(title=f"Predicted and measured on {gpu.name}, in µs")
    for title in ("case", "schedule"):
        table.add_column(title)
    for title in ("predicted", "measured", "measured / predicted"):
        table.add_column(title, justify="right")
    for found in compared:
        ratio = f"{found.measured / found.predicted:.2f}"
        table.add_row(found.case, found.schedule, _us(found.predicted), _us(found.measured), ratio)
    console.print(table)
    correlation = rank_correlation(compared)
    if correlation is not None:
        console.print(f"rank correlation (Spearman): {correlation:.2f} over {len(compared)} times")


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"must be N,C,H,W, as in 128,128,56,56, got {text!r}")
    return sizes


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _us(seconds: float | None) -> str:
    """Microseconds as people read them; "-" for what the code does not say."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.0f}" if seconds >= 100e-6 else f"{seconds * 1e6:.1f}"
