"""The options that describe a unit and its input, for the subcommands that ask about one."""

from __future__ import annotations

import argparse
from typing import Any

from ..grid import PRECISIONS, unit_spec
from ..model.speed_of_light import Problem
from ..shapes import CLASSIC, GROUPS, PAPER, STAGES, Shape
from .arguments import positive, sizes

DEFAULT_BATCH = 128


def add_unit_arguments(parser: argparse.ArgumentParser, subject: Any) -> None:
    """The options that describe a unit and its input, as :func:`problem_of` reads them; `subject`: their group."""
    subject.add_argument("--shape", type=sizes, metavar="N,C,H,W", help="of the input")
    subject.add_argument("--stage", type=int, choices=tuple(STAGES), help="stage of SKNet-50 instead")
    parser.add_argument(
        "--batch", type=positive, metavar="N", help=f"samples, without --shape (default {DEFAULT_BATCH})"
    )
    parser.add_argument("--unit", choices=(PAPER, CLASSIC), help="default: the paper's")
    parser.add_argument("--groups", type=positive, metavar="G", help=f"default {GROUPS}")
    parser.add_argument(
        "--kernels",
        type=positive,
        nargs="+",
        metavar="K",
        help="per branch (default: 3 3; the classic unit: 3 5)",
    )
    parser.add_argument(
        "--dilations",
        type=positive,
        nargs="+",
        metavar="D",
        help="per branch (default: 1 2; the classic unit: 1 1)",
    )
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="fp16", help="default: fp16")


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem that the command's options describe.

    Raises:
        ValueError: a batch beside a shape, kernels and dilations of different numbers, or a unit that `SKSpec` refuses.
    """
    if args.stage:
        channels, size = STAGES[args.stage]
        shape = (batch_of(args), channels, size, size)
    else:
        shape = args.shape
        if args.batch:
            raise ValueError(f"--batch does not act on --shape, whose first size is the batch, {shape[0]}")
    unit = unit_of(args)
    defaults = ([3, 3], [1, 2]) if unit == PAPER else ([3, 5], [1, 1])
    kernels, dilations = args.kernels or defaults[0], args.dilations or defaults[1]
    if len(kernels) != len(dilations):
        raise ValueError(
            "--kernels and --dilations must name as many branches, got "
            f"{' '.join(map(str, kernels))} and {' '.join(map(str, dilations))}"
        )
    described = Shape(*shape[1:], args.groups or GROUPS, tuple(kernels), tuple(dilations))
    return Problem(unit_spec(unit, described), shape[0], *shape[2:], *PRECISIONS[args.dtype])


def unit_of(args: argparse.Namespace) -> str:
    """Which unit the options say."""
    return str(args.unit or PAPER)


def refuse_unit_options(args: argparse.Namespace, given: str) -> None:
    """`given` says which units: options that describe one do not act on it.

    Raises:
        ValueError: one of them is given.
    """
    for name in ("unit", "groups", "kernels", "dilations"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} does not act on {given}, which says what its units are")


def batch_of(args: argparse.Namespace) -> int:
    """The samples that the options say, where no shape does."""
    return args.batch or DEFAULT_BATCH
