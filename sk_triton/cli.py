"""The `sk-triton` command. A subcommand's module is imported only when that subcommand runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sk_triton.environment import missing_message, version
from sk_triton.exit_codes import CLOSED_OUTPUT, INTERRUPTED, MISSING_PACKAGE


@dataclass(frozen=True)
class Command:
    """A subcommand: its module has `add_arguments(parser)` and `run(args) -> exit code`."""

    module: str
    summary: str


COMMANDS = {
    "bench": Command(
        "sk_triton.bench.commands.bench", "measure the SK layer against its peers on this machine"
    ),
    "configs": Command("sk_triton.tuning.command", "list, show, export, import or clear tuned configs"),
    "doctor": Command("sk_triton.doctor", "say what is installed, which backend runs and why"),
    "explain": Command(
        "sk_triton.bench.commands.explain", "predict each schedule's time on a GPU that need not be present"
    ),
    "plot": Command(
        "sk_triton.bench.commands.plot", "draw results files, write them as CSV or Markdown, fill the README"
    ),
    "profile": Command("sk_triton.bench.commands.profile", "time a unit's kernels one by one on this GPU"),
    "report": Command(
        "sk_triton.bench.commands.report",
        "test and measure everything on this machine, step by step, in one folder",
    ),
    "resources": Command(
        "sk_triton.bench.commands.resources", "compile the kernels for each chip, list what they use"
    ),
    "traffic": Command("sk_triton.bench.commands.traffic", "count each schedule's passes over memory"),
    "tune": Command("sk_triton.bench.commands.tune", "measure configs on this GPU, and keep what is faster"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; 1 where its output is closed early, 2 for bad usage or a missing
    optional package."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # what is closed shows here, not when the interpreter ends
    except BrokenPipeError:
        # The interpreter flushes once more: https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_OUTPUT


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[0] if arguments else None
    try:
        parser = _parser(chosen)
        args = parser.parse_args(arguments)
        if args.command is None:
            parser.print_help()
            return 0
        return importlib.import_module(COMMANDS[args.command].module).run(args)
    except ModuleNotFoundError as error:
        message = missing_message(error.name or "")
        if message is None:
            raise
        print(f"sk-triton {chosen}: {message}", file=sys.stderr)
        return MISSING_PACKAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The whole command's parser; only the chosen subcommand's options are filled in."""
    parser = argparse.ArgumentParser(
        prog="sk-triton", description="Selective Kernel convolution accelerated with Triton"
    )
    parser.add_argument("--version", action="version", version=f"sk_triton {version('sk-triton')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name == chosen:
            importlib.import_module(command.module).add_arguments(subparser)
    return parser
