"""`sk-triton bench`: measures, prints tables, writes results files and plots."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sk_triton.environment import require
from sk_triton.exit_codes import FAILED, INTERRUPTED

from ..problems import in_one_line
from ..shapes import STAGES
from ..suites import GPU_OPTIONS, HOST, LAYER, ONE_BATCH, OPTIONS, SUITES, Choice
from .arguments import DTYPE_NAMES, bad_usage, choose_device, positive, seed, whole_seconds, writable_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from ..measuring.session import SuiteRequest
    from ..measuring.sources import Ours
    from ..results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton bench`."""
    # Without docstrings, as under -OO, a suite's name has to do.
    summaries = {name: (suite.__doc__ or name).partition(".")[0] for name, suite in SUITES.items()}
    summaries[HOST] = "What a call costs the host, and what starting up costs"
    described = "; ".join(f"{name}: {summary[0].lower()}{summary[1:]}" for name, summary in summaries.items())
    parser.add_argument(
        "--suite",
        choices=tuple(summaries),
        nargs="+",
        default=[LAYER],
        help=f"what to measure (default: layer). {described}",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and forms, less time on each")
    parser.add_argument("--batch", type=positive, nargs="+", metavar="N", help="batch sizes")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", help="dtypes")
    parser.add_argument(
        "--stage", type=int, choices=tuple(STAGES), nargs="+", help="stages of SKNet-50: 128@56² is 1"
    )
    parser.add_argument(
        "--every-form", action="store_true", help="max-autotune too, and compiled peers on a CPU; takes long"
    )
    parser.add_argument("--compare", metavar="REV", help="measure this git revision of sk_triton as well")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, default=Path("sk-triton-bench"), metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the cases that DIR already holds, measured in the same way",
    )
    parser.add_argument(
        "--time-limit",
        type=whole_seconds,
        metavar="SECONDS",
        help="begin no case of a suite that would end after this",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of weights and inputs (default 0)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if anything was wrong or failed or a guard objects, 2 for bad usage, 130 if interrupted.

    Raises:
        MissingPackageError: rich, matplotlib or scikit-learn is not installed.
    """
    require("rich", "matplotlib", "sklearn")
    from rich.console import Console

    from ..measuring.protocol import device_trouble
    from ..measuring.revision import RevisionError, revision_source

    console = Console()
    with contextlib.ExitStack() as stack:
        try:
            device = choose_device(args.device)
            refuse_idle_options(args, on_gpu=device.type == "cuda")
            revisions = (stack.enter_context(revision_source(args.compare)),) if args.compare else ()
            requests = [_request(suite, args, device, revisions) for suite in dict.fromkeys(args.suite)]
            earlier = [_earlier(request, args) for request in requests]
            writable_folder(args.output)
        except (ValueError, OSError, RevisionError) as error:
            return bad_usage("bench", error)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        codes = []
        for request, kept in zip(requests, earlier, strict=True):
            codes.append(_run_suite(request, kept, args.output, console))
            if codes[-1] == INTERRUPTED:
                break
            if trouble := device_trouble(device):
                console.print(f"the GPU failed: {trouble}", markup=False, style="red", soft_wrap=True)
                codes.append(FAILED)
                break
    return max(codes)


def _request(
    suite: str, args: argparse.Namespace, device: torch.device, revisions: Sequence[Ours]
) -> SuiteRequest:
    from ..measuring.session import SuiteRequest

    choice = Choice(
        on_gpu=device.type == "cuda",
        quick=args.quick,
        stages=tuple(args.stage) if args.stage else None,
        batches=tuple(args.batch) if args.batch else None,
        dtypes=tuple(args.dtype) if args.dtype else None,
    )
    return SuiteRequest(
        suite,
        device,
        choice,
        seed=args.seed,
        every_form=args.every_form,
        revisions=revisions,
        time_limit=args.time_limit,
    )


def _earlier(request: SuiteRequest, args: argparse.Namespace) -> Results | None:
    """What `--resume` keeps. Raises ValueError where that was measured in another way: it would be overwritten."""
    from ..measuring.session import reusable

    if not args.resume or request.suite == HOST:
        return None
    try:
        return reusable(_path(request, args.output), request)
    except ValueError as error:
        raise ValueError(f"{error}: take another --output, or leave --resume out to replace it") from None


def _path(request: SuiteRequest, folder: Path) -> Path:
    return folder / f"{request.suite}-{request.device.type}.json"


def _run_suite(request: SuiteRequest, earlier: Results | None, folder: Path, console: Console) -> int:
    """Measures a suite, writes and shows it; what fails on the way costs the other suites nothing."""
    from .. import results

    path, saves = _path(request, folder), 0

    def save(run: Results) -> None:
        nonlocal saves
        results.save(run, path)
        saves += 1

    try:
        return _measure_and_show(request, earlier, path, save, console)
    except Exception as error:
        words = f"suite {request.suite} failed: {in_one_line(error)}"
        kept = f"; what was measured until then is in {path}" if saves else ""
        console.print(f"{words}{kept}", markup=False, style="red", soft_wrap=True)
        return FAILED


def _measure_and_show(
    request: SuiteRequest,
    earlier: Results | None,
    path: Path,
    save: Callable[[Results], object],
    console: Console,
) -> int:
    from .. import csv_file, plots, table
    from ..measuring.session import measure_suite

    measured, left = measure_suite(request, console, earlier, save)
    save(measured)
    csv_file.write_csv(measured, path.with_suffix(".csv"))
    table.show(measured, console)
    if left:
        console.print(f"time limit: {left} cases left; go on with --resume", style="yellow")
    console.print(f"\nresults  {path}", markup=False, soft_wrap=True)
    code = INTERRUPTED if measured.interrupted else measured.exit_code
    for name, saved in plots.save_plots(measured, path.parent):
        if isinstance(saved, Exception):
            console.print(
                f"picture {name} failed: {in_one_line(saved)}", markup=False, style="red", soft_wrap=True
            )
            code = code or FAILED
        else:
            console.print(f"plot     {saved}", markup=False, soft_wrap=True)
    return code


def refuse_idle_options(args: argparse.Namespace, on_gpu: bool) -> None:
    """Raises ValueError for an option that has no effect on any of the chosen suites, or not with all its values."""
    used_by = {
        suite: {*used, *(GPU_OPTIONS.get(suite, ()) if on_gpu else ())} for suite, used in OPTIONS.items()
    }
    for option in dict.fromkeys(option for used in used_by.values() for option in sorted(used)):
        if getattr(args, option) and not any(option in used_by[suite] for suite in args.suite):
            users = ", ".join(suite for suite, used in used_by.items() if option in used)
            where = "" if on_gpu else ", without a GPU"
            raise ValueError(
                f"--{option.replace('_', '-')} acts on suites {users}, got --suite {' '.join(args.suite)}{where}"
            )
    only_one = [suite for suite in ONE_BATCH if suite in args.suite]
    if only_one and len(args.batch or ()) > 1:
        raise ValueError(
            f"--batch takes one size for suites {', '.join(only_one)}, got {' '.join(map(str, args.batch))}"
        )
