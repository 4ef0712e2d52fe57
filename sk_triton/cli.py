"""The `sk-triton` command. A subcommand's module is imported only when that subcommand runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .environment import missing_message, version
from .exit_codes import CLOSED_OUTPUT, FAILED, INTERRUPTED, MISSING_PACKAGE


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
    """Runs one subcommand and returns its exit code; 1 where its output is closed early or full, 2 for bad usage or a
    missing optional package."""
    _write_any_text()
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:  # as it is where no file is open there
                sys.stdout.flush()  # what is closed or full shows here, not when the interpreter ends
    except BrokenPipeError:
        _drop_output()
        return CLOSED_OUTPUT
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print(f"sk-triton: {error}", file=sys.stderr)
        return FAILED


def _write_any_text() -> None:
    """What an output's encoding does not have is written as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> None:
    # The interpreter flushes once more: https://docs.python.org/3/library/signal.html#note-on-sigpipe
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
