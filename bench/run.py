"""`sk-triton bench`: measures, prints tables, writes a JSON file and a plot."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sk_triton.environment import require

from .shapes import STAGES, default_grid

DTYPE_NAMES = ("fp16", "bf16", "fp32")
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton bench`."""
    parser.add_argument("--quick", action="store_true", help="two stages, two batch sizes, one dtype")
    parser.add_argument("--batch", type=_positive, nargs="+", metavar="N", help="batch sizes")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", help="dtypes")
    parser.add_argument(
        "--stages", type=int, choices=tuple(STAGES), nargs="+", help="stages of SKNet-50: 128@56² is 1"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--output", type=Path, default=Path("sk-triton-bench"), metavar="DIR", help="folder for the results"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and inputs (default 0)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if a provider was wrong or failed, 130 if interrupted; raises MissingPackageError."""
    require("rich", "matplotlib", "sklearn")
    from rich.console import Console

    from . import plots, results, suite, table
    from .progress import case_progress
    from .protocol import Budget, timer_for
    from .providers import UNITS, providers

    console = Console()
    try:
        device = _device(args.device)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        console.print(f"sk-triton bench: {error}", markup=False, style="red")
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    grid = default_grid(device.type, args.quick)
    grid = replace(
        grid,
        stages=tuple(args.stages or grid.stages),
        batches=tuple(args.batch or grid.batches),
        dtypes=tuple(args.dtype or grid.dtypes),
    )
    setting = suite.Setting(
        device=device,
        seed=args.seed,
        providers={unit: providers(unit, device.type, args.quick) for unit in UNITS},
        timer=timer_for(device),
        budget=Budget(warmup_seconds=0.2, seconds=1.0, min_rounds=5) if args.quick else Budget(),
    )
    stamp = results.stamp(device)
    console.print(
        f"{device.type.upper()}: {stamp.device}, torch {stamp.torch}, triton {stamp.triton}",
        markup=False,
    )
    records: list[results.Record] = []
    interrupted = False
    cases = list(suite.cases(grid))
    try:
        with case_progress(console, len(cases)) as report:
            for index, case in enumerate(cases):
                suite.run_case(case, setting, records, partial(report, index, case.title))
    except KeyboardInterrupt:
        interrupted = True
    measured = results.Results("layer", args.seed, stamp, tuple(records), interrupted)
    table.show(measured, console)
    path = args.output / f"layer-{device.type}.json"
    results.save(measured, path)
    console.print(f"\nresults  {path}", markup=False, soft_wrap=True)
    for path in plots.save_plots(measured, args.output):
        console.print(f"plot     {path}", markup=False, soft_wrap=True)
    return INTERRUPTED if interrupted else measured.exit_code


def _device(name: str) -> torch.device:
    """Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name!r}, but {torch.cuda.device_count()} GPUs are visible to PyTorch")
    return device


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
