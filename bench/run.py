"""`sk-triton bench`: measures, prints tables, writes results files and plots."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sk_triton.environment import require
from sk_triton.exit_codes import BAD_USAGE, FAILED, INTERRUPTED

from .arguments import DTYPE_NAMES, choose_device, positive
from .suites import HOST, LAYER, OPTIONS, SUITES, Choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from .measuring.sources import Ours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton bench`."""
    summaries = {name: (suite.__doc__ or "").partition(".")[0] for name, suite in SUITES.items()}
    summaries[HOST] = "What a call costs the host, and what starting up costs"
    described = "; ".join(f"{name}: {summary[0].lower()}{summary[1:]}" for name, summary in summaries.items())
    parser.add_argument(
        "--suite",
        choices=tuple(summaries),
        nargs="+",
        default=[LAYER],
        help=f"what to measure (default: layer). {described}",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and peers, less time on each")
    parser.add_argument("--batch", type=positive, nargs="+", metavar="N", help="batch sizes")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", help="dtypes")
    parser.add_argument(
        "--stages", type=int, choices=(1, 2, 3, 4), nargs="+", help="stages of SKNet-50: 128@56² is 1"
    )
    parser.add_argument(
        "--every-form", action="store_true", help="max-autotune too, and compiled peers on a CPU; takes long"
    )
    parser.add_argument("--compare", metavar="REV", help="measure this git revision of sk_triton as well")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, default=Path("sk-triton-bench"), metavar="DIR", help="folder for the results"
    )
    parser.add_argument("--resume", action="store_true", help="keep the cases that DIR already holds")
    parser.add_argument(
        "--time-limit",
        type=positive,
        metavar="SECONDS",
        help="begin no case of a suite that would end after this",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and inputs (default 0)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if a provider was wrong or failed or a guard objects, 2 for bad usage, 130 if interrupted.

    Raises:
        MissingPackageError: rich, matplotlib or scikit-learn is not installed.
    """
    require("rich", "matplotlib", "sklearn")
    from rich.console import Console

    from .measuring.revision import RevisionError, revision_source
    from .measuring.session import device_trouble

    console = Console()
    with contextlib.ExitStack() as stack:
        try:
            refuse_idle_options(args)
            device = choose_device(args.device)
            revisions = (stack.enter_context(revision_source(args.compare)),) if args.compare else ()
            args.output.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError, RevisionError) as error:
            console.print(f"sk-triton bench: {error}", markup=False, style="red", soft_wrap=True)
            return BAD_USAGE
        if device.type == "cuda":
            torch.cuda.set_device(device)
        codes = []
        for suite in dict.fromkeys(args.suite):
            codes.append(_run_suite(suite, args, device, revisions, console))
            if codes[-1] == INTERRUPTED:
                break
            if trouble := device_trouble(device):
                console.print(f"the GPU failed: {trouble}", markup=False, style="red", soft_wrap=True)
                codes.append(FAILED)
                break
    return max(codes)


def _run_suite(
    suite: str, args: argparse.Namespace, device: torch.device, revisions: Sequence[Ours], console: Console
) -> int:
    from . import export, plots, results, table
    from .measuring.session import Request, measure_suite, reusable

    choice = Choice(
        on_gpu=device.type == "cuda",
        quick=args.quick,
        stages=tuple(args.stages) if args.stages else None,
        batches=tuple(args.batch) if args.batch else None,
        dtypes=tuple(args.dtype) if args.dtype else None,
    )
    request = Request(
        suite,
        device,
        choice,
        seed=args.seed,
        every_form=args.every_form,
        revisions=revisions,
        time_limit=args.time_limit,
    )
    path = args.output / f"{suite}-{device.type}.json"
    earlier = reusable(path, request) if args.resume else None
    measured, left = measure_suite(request, console, earlier, lambda run: results.save(run, path))
    results.save(measured, path)
    export.write_csv(measured, path.with_suffix(".csv"))
    table.show(measured, console)
    if left:
        console.print(f"time limit: {left} cases left; go on with --resume", style="yellow")
    console.print(f"\nresults  {path}", markup=False, soft_wrap=True)
    for picture in plots.save_plots(measured, args.output):
        console.print(f"plot     {picture}", markup=False, soft_wrap=True)
    return INTERRUPTED if measured.interrupted else measured.exit_code


def refuse_idle_options(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that has no effect on any of the chosen suites."""
    for option in ("stages", "batch", "dtype"):
        if getattr(args, option) and not any(option in OPTIONS[suite] for suite in args.suite):
            users = ", ".join(suite for suite, used in OPTIONS.items() if option in used)
            raise ValueError(f"--{option} acts on suites {users}, got --suite {' '.join(args.suite)}")
