"""`sk-triton plot`: pictures, CSV and Markdown of results files, and the README's generated parts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from sk_triton.environment import require
from sk_triton.exit_codes import FAILED

from .. import readme
from ..csv_file import write_csv
from ..markdown import markdown_table
from ..problems import in_one_line
from ..results import read
from ..text_file import write_text
from .arguments import bad_usage, writable_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton plot`."""
    parser.add_argument(
        "results", type=Path, nargs="*", metavar="RESULT.json", help="what `sk-triton bench` wrote"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the pictures (default: beside each results file)",
    )
    parser.add_argument("--csv", action="store_true", help="also write a CSV file of each results file")
    parser.add_argument(
        "--markdown", action="store_true", help="also write a Markdown table of each results file"
    )
    parser.add_argument(
        "--all-forms",
        action="store_true",
        help="show every form and schedule, not each source's fastest form only",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="README.md",
        help="fill its generated parts from bench/results/ beside it",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if a picture cannot be drawn, 2 for a file that cannot be used; raises MissingPackageError."""
    require("matplotlib")
    written: list[Path] = []
    failures: list[str] = []
    try:
        if args.readme is not None:
            written = _fill_readme(args)
        elif args.results:
            written, failures = _draw(args)
        else:
            raise ValueError("RESULT.json must name at least one results file (or give --readme README.md)")
    except (OSError, ValueError) as error:
        return bad_usage("plot", error)
    for path in written:
        print(path)
    for failure in failures:
        print(f"sk-triton plot: {failure}", file=sys.stderr)
    return FAILED if failures else 0


def _draw(args: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The files written, and a line for each picture that could not be drawn."""
    from .. import plots

    paths = list(dict.fromkeys(args.results))
    runs = [read(path) for path in paths]
    for folder in dict.fromkeys([args.output] if args.output else [path.parent for path in paths]):
        writable_folder(folder, "--output" if args.output else "the folder of RESULT.json, without --output,")
    written: list[Path] = []
    failures: list[str] = []

    def collect(saved: Iterable[tuple[str, Path | Exception]]) -> None:
        for name, outcome in saved:
            if isinstance(outcome, Path):
                written.append(outcome)
            else:
                failures.append(f"picture {name} failed: {in_one_line(outcome)}")

    for path, stem, run in zip(paths, _stems(paths, args.output), runs, strict=True):
        folder = args.output or path.parent
        try:
            saved = plots.save_plots(run, folder, stem, args.all_forms)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        collect(saved)
        if args.csv:
            write_csv(run, folder / f"{stem}.csv")
            written.append(folder / f"{stem}.csv")
        if args.markdown:
            write_text(markdown_table(run), folder / f"{stem}.md")
            written.append(folder / f"{stem}.md")
    if len(runs) > 1:
        before = len(written) + len(failures)
        collect(plots.save_comparisons(runs, args.output or paths[0].parent))
        if len(written) + len(failures) == before:
            print(
                "sk-triton plot: no comparison drawn: no case was timed with sk_triton in two of the results files",
                file=sys.stderr,
            )
    return written, failures


def _stems(paths: list[Path], output: Path | None) -> list[str]:
    """What the files made of each results file are called; its folder is named too where one folder takes all.

    Raises:
        ValueError: two results files would give the same names.
    """
    stems = [path.stem for path in paths]
    if output is None or len(set(stems)) == len(stems):
        return stems
    longer = [f"{path.resolve().parent.name}-{path.stem}" for path in paths]
    if len(set(longer)) < len(longer):
        raise ValueError(
            f"RESULT.json must differ in name or folder to share --output, got {', '.join(longer)}"
        )
    return longer


def _fill_readme(args: argparse.Namespace) -> list[Path]:
    if args.results or args.output is not None or args.csv or args.markdown or args.all_forms:
        raise ValueError(
            "--readme takes no results files and no other options: it reads bench/results/ beside it"
        )
    if not args.readme.is_file():
        raise ValueError(f"--readme must be a file with generated parts, got {args.readme}, which is none")
    return readme.update(args.readme)
