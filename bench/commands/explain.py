"""`sk-triton explain`: what each schedule takes on a GPU that need not be present, what bounds it, which is chosen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sk_triton import planning
from sk_triton.backend import Schedule
from sk_triton.chips import Chip
from sk_triton.environment import require

from ..formats import microseconds
from ..model import speed_of_light as sol
from ..model import validation
from ..model.choice import choice, refused, rejected
from ..model.gpus import Gpu, chip_for, find_gpu, refuse_precision
from ..model.speed_of_light import Prediction, Problem
from ..model.validation import Compared, committed, compare, measured_here, rank_correlation
from .arguments import bad_usage
from .unit_arguments import add_unit_arguments, problem_of, unit_of

if TYPE_CHECKING:
    from rich.table import Table

SHORT = {sol.MATRIX: "tensor", sol.SHARED: "shared", sol.ISSUE: "issue"}
"""Bounds as the table's head has them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton explain`."""
    parser.add_argument("--gpu", required=True, help="h100, a100, rtx4090, … or a device's full name")
    add_unit_arguments(parser, parser.add_mutually_exclusive_group(required=True))
    parser.add_argument(
        "--validate",
        action="store_true",
        help="compare with every measured time of the unit on that GPU, not only with this input's",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints the predictions; returns 2 for a GPU or a unit that is not known."""
    require("rich", "triton")
    from rich.console import Console

    from ..progress import case_progress

    try:
        gpu = find_gpu(args.gpu)
        refuse_precision(gpu, args.dtype)
        problem = problem_of(args)
        measured = committed(gpu, unit_of(args), args.dtype)
        names = planning.possible_schedules(problem.on(chip_for(gpu)))
        steps = len(names) + (len(measured) if args.validate else 0)
        # On stderr: the output may be JSON.
        console = Console(stderr=True, quiet=not sys.stderr.isatty())
        with case_progress(console, steps) as report:
            predictions = _predict(problem, gpu, names, lambda done, name: report(done, name, 0.0))
            if args.validate:
                compared = compare(
                    measured, gpu, args.dtype, lambda done, case: report(len(names) + done, case.title, 0.0)
                )
            else:
                compared = measured_here(problem, measured, args.dtype, predictions)
    except ValueError as error:
        return bad_usage("explain", error)
    if args.json:
        print(json.dumps(as_json(problem, gpu, predictions, compared), indent=1))
        return 0
    show(problem, gpu, predictions, compared)
    if not compared:
        print(_why_not_measured(gpu, args.dtype, len(measured)))
    return 0


def _predict(
    problem: Problem, gpu: Gpu, names: Sequence[Schedule], report: Callable[[int, str], object]
) -> list[Prediction]:
    """As `sol.predict`, one schedule after the other, each reported with how many are done."""
    found = []
    for done, name in enumerate(names):
        report(done, name)
        found.append(sol.predict_all([problem], gpu, [name])[0][0])
    return found + sol.predict_all([problem], gpu, [])[0]


def _why_not_measured(gpu: Gpu, dtype: str, cases: int) -> str:
    if not validation.RESULTS.is_dir():  # as in a wheel
        return "not measured: this installation holds no measured results, which are in the repository's bench/results"
    if not cases:
        return f"not measured: no results of {gpu.name} in {dtype} are committed"
    among = f"the {cases} cases of {gpu.name} in {dtype}"
    return f"not measured: this input is not among {among}; --validate compares those"


def as_json(
    problem: Problem, gpu: Gpu, predictions: list[Prediction], compared: list[Compared]
) -> dict[str, Any]:
    """Everything the command knows, times in microseconds."""
    chip = chip_for(gpu)
    chosen, reason = choice(problem, predictions, chip)
    return {
        "gpu": gpu.name,
        "chip": gpu.chip,
        "sources": gpu.sources,
        "shape": [problem.n, problem.spec.in_channels, problem.height, problem.width],
        "dtype": str(problem.dtype).removeprefix("torch."),
        "branches": [str(branch) for branch in problem.spec.branches],
        "choice": {"schedule": chosen, "reason": reason, "rejected": rejected(problem, predictions, chip)},
        "refused": refused(problem, chip),
        "schedules": [
            {
                "schedule": prediction.schedule,
                "total_us": prediction.total * 1e6,
                "bound": prediction.bound,
                "passes": prediction.memory_bytes / problem.tensor_bytes,
                "bounds_us": {b: _microseconds(prediction.seconds(b)) for b in sol.BOUNDS},
                "configs": [
                    {"task": task, "config": str(config), "source": source}
                    for task, config, source in prediction.configs
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
        "measured": [
            {
                "case": found.case,
                "schedule": found.schedule,
                "predicted_us": found.predicted * 1e6,
                "measured_us": found.measured * 1e6,
            }
            for found in compared
        ],
        "rank_correlation": rank_correlation(compared),
    }


def show(problem: Problem, gpu: Gpu, predictions: list[Prediction], compared: list[Compared]) -> None:
    """Prints the tables."""
    from rich.console import Console

    console = Console()
    console.print(_predicted_table(problem, gpu, predictions))
    console.print()
    heads = ", ".join(f"{short}: {bound}" for bound, short in SHORT.items())
    console.print(
        f"Each launch takes its largest bound and {microseconds(gpu.launch_seconds)} µs to start. {heads}; warps: "
        "resident on a processor, of those that fit. ≥: loops that the compiler unrolled count once. Latency is not "
        "modelled: these are predictions, mostly too short, not measurements.\n"
    )
    for line in _words(problem, predictions, chip_for(gpu)):
        console.print(line, markup=False, highlight=False)
    if not compared:
        return
    console.print(_measured_table(gpu, compared))
    correlation = rank_correlation(compared)
    if correlation is not None:
        console.print(f"rank correlation (Spearman): {correlation:.2f} over {len(compared)} times")


def _predicted_table(problem: Problem, gpu: Gpu, predictions: list[Prediction]) -> Table:
    """Of each schedule, and of ours each launch: what every bound takes. Narrow: nine columns have to fit into 80."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=f"Predicted for {gpu.name} ({gpu.chip}), in µs: {problem.n} x {problem.spec.in_channels} x "
        f"{problem.height} x {problem.width}, {', '.join(map(str, problem.spec.branches))}",
    )
    table.add_column("schedule", no_wrap=True)
    for title in (*map(_short, sol.BOUNDS), "warps", "total"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for prediction in predictions:
        table.add_section()
        bounds = [microseconds(prediction.seconds(bound)) for bound in sol.BOUNDS]
        total = microseconds(prediction.total)
        table.add_row(prediction.schedule, *bounds, "", total, _short(prediction.bound), style="bold")
        for step in prediction.steps if prediction.is_ours else ():
            table.add_row(*_launch_row(step, gpu))
    return table


def _launch_row(step: sol.Step, gpu: Gpu) -> list[str]:
    mark = "" if step.work.is_counted else "≥"
    cells = [
        # Memory is known from the tensors; what the code says is short of its uncounted loops.
        ("" if bound == sol.MEMORY or step.seconds[bound] is None else mark)
        + microseconds(step.seconds[bound])
        for bound in sol.BOUNDS
    ]
    warps = f"{step.resident_warps}/{gpu.threads // gpu.warp}" if step.work.programs else ""
    return [f"  {step.work.name}", *cells, warps, mark + microseconds(step.total), _short(step.bound)]


def _words(problem: Problem, predictions: list[Prediction], chip: Chip) -> Iterator[str]:
    """Lines about the configs, what cannot run, and the choice."""
    for prediction in predictions:
        tasks = {task for task, *_ in prediction.configs}
        for task, config, source in prediction.configs:
            name = f"{prediction.schedule}, {task}" if len(tasks) > 1 else prediction.schedule
            yield f"{name}: {config}, from {source}"
    for schedule, reason in refused(problem, chip).items():
        yield f"{schedule}: {reason}"
    chosen, reason = choice(problem, predictions, chip)
    yield f"choice: {chosen}: {reason}"
    for schedule, reason in rejected(problem, predictions, chip).items():
        yield f"  not {schedule}: {reason}"


def _measured_table(gpu: Gpu, compared: list[Compared]) -> Table:
    from rich.table import Table

    table = Table(
        title=f"Predicted today and measured on {gpu.name} at the commits that bench/results names, in µs"
    )
    for title in ("case", "schedule"):
        table.add_column(title)
    for title in ("predicted", "measured", "measured / predicted"):
        table.add_column(title, justify="right")
    for found in compared:
        ratio = f"{found.measured / found.predicted:.2f}"
        times = microseconds(found.predicted), microseconds(found.measured)
        table.add_row(found.case, found.schedule, *times, ratio)
    return table


def _short(bound: str) -> str:
    return SHORT.get(bound, bound)


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6
