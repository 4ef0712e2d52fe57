"""`sk-triton configs`: what was tuned, in this user's file."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ..exit_codes import BAD_USAGE, FAILED
from . import user_file
from .entries import BrokenFileError, Entry, Origin, Sections, dump_config, dump_sections, load_sections
from .keys import gpu_slug

TUNE = "`sk-triton tune` makes them"
NO_ENTRIES = f"no entries; {TUNE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton configs`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="the GPUs and versions that there are entries for")
    show = actions.add_parser("show", help="every entry, with what was tried")
    show.add_argument("--key", metavar="TEXT", default="", help="only those whose key contains this")
    export = actions.add_parser("export", help="write the entries to a file, as one to contribute")
    export.add_argument(
        "file", type=Path, metavar="FILE", help="a new file, or a folder that gets one per GPU"
    )
    export.add_argument("--all", action="store_true", help="those for other versions of the kernels too")
    importing = actions.add_parser("import", help="add the entries of a file, after checking them")
    importing.add_argument("file", type=Path, metavar="FILE")
    clear = actions.add_parser("clear", help="remove all entries")
    clear.add_argument("--stale", action="store_true", help="only those that this version does not use")


def run(args: argparse.Namespace) -> int:
    """Returns 0, 1 if a file could not be read or written, 2 if it is not a file of configs."""
    actions = {"list": _list, "show": _show, "export": _export, "import": _import, "clear": _clear}
    try:
        with _warnings_in_a_line():
            return actions[args.action](args)
    except BrokenFileError as error:
        print(f"sk-triton configs: {error}", file=sys.stderr)
        return BAD_USAGE
    except BrokenPipeError:
        raise  # the output, not a file
    except OSError as error:
        print(f"sk-triton configs: {error}", file=sys.stderr)
        return FAILED


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """What a library warns of, with the line of its source, is what this command has to say."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **options: print(
            f"sk-triton configs: {str(message).removeprefix('sk_triton: ')}", file=sys.stderr
        )
        yield


def _list(args: argparse.Namespace) -> int:
    sections = _kept()
    print(user_file.path())
    for origin, entries in sections.items():
        tuned = sum(entry.is_tuned for entry in entries.values())
        print(f"{_title(origin)}: {len(entries)} entries, {tuned} faster than the analytic choice")
    if not sections:
        print(NO_ENTRIES)
    return 0


def _show(args: argparse.Namespace) -> int:
    sections = _kept()
    found = False
    for origin, entries in sections.items():
        print(_title(origin))
        for key, entry in sorted(entries.items()):
            if args.key in key:
                found = True
                print("\n".join(f"  {line}" for line in _describe(key, entry)))
    if not any(sections.values()):
        print(NO_ENTRIES)
    elif not found:
        print(f"no entry whose key contains {args.key!r}")
    return 0


def _export(args: argparse.Namespace) -> int:
    kept = _kept()
    chosen = {o: entries for o, entries in kept.items() if args.all or o.is_current}
    if not chosen:
        stale = sum(map(len, kept.values()))
        how = f"{stale} are for other versions of the kernels, --all exports these" if stale else TUNE
        print(f"sk-triton configs: there are no entries to export; {how}", file=sys.stderr)
        return FAILED
    files: dict[Path, Sections] = {args.file: chosen}
    if args.file.is_dir():
        files = {}
        for origin, entries in chosen.items():
            file = args.file / f"{gpu_slug(origin.gpu, origin.processors)}.json"
            files.setdefault(file, {})[origin] = entries
    for file, sections in files.items():
        with file.open("x", encoding="utf-8") as stream:  # never over another file
            stream.write(dump_sections(sections))
        print(f"{file}: {sum(map(len, sections.values()))} entries")
    return 0


def _import(args: argparse.Namespace) -> int:
    sections = _load_and_report(args.file, lambda: load_sections(user_file.read_text(args.file)))
    for origin, entries in sections.items():
        print(f"{_title(origin)}: {len(entries)} entries")
    if not any(sections.values()):
        print(f"sk-triton configs: {args.file} holds no entry to import", file=sys.stderr)
        return BAD_USAGE
    return 0 if user_file.merge(sections) else FAILED


def _clear(args: argparse.Namespace) -> int:
    before = user_file.read()
    if user_file.path().exists() and not user_file.clear(lambda origin: args.stale and origin.is_current):
        return FAILED
    after = user_file.read()
    print(
        f"{sum(map(len, before.values())) - sum(map(len, after.values()))} entries removed from {user_file.path()}"
    )
    return 0


def _kept() -> Sections:
    return _load_and_report(user_file.path(), user_file.inspect)


def _load_and_report(file: Path, load: Callable[[], tuple[Sections, list[str]]]) -> Sections:
    """The sound entries of a file; prints why the others are ignored.

    Raises:
        BrokenFileError: it is no file of configs; the message names it.
    """
    try:
        sections, complaints = load()
    except BrokenFileError as error:
        raise BrokenFileError(f"{file}: {error}") from None
    for complaint in complaints:
        print(f"ignored: {complaint}", file=sys.stderr)
    return sections


def _title(origin: Origin) -> str:
    made = f"Triton {origin.triton}, kernels {origin.kernels}"
    stale = "" if origin.is_current else "; not used: made for other versions"
    return f"{origin.gpu} ({origin.processors} SMs, {origin.chip}; {made}{stale})"


def _describe(key: str, entry: Entry) -> list[str]:
    lines = [key]
    batch = f"at a batch of {entry.n}"
    if entry.failure:
        lines.append(f"  not measured {batch}: {entry.failure}")
    elif entry.choice is None:
        lines.append(f"  the analytic choice stays {batch}, {_us(entry.analytic_seconds)} µs")
    else:
        times = f"{_us(entry.tuned_seconds)} µs against {_us(entry.analytic_seconds)}"
        lines.append(f"  {_shown(entry.choice)} {batch}: {times}")
    for trial in entry.trials:
        found = f"out: {trial.dropped}" if trial.dropped else "not timed"
        if trial.measured is not None:
            found = f"measured {_us(trial.measured)} µs"
        foreseen = "" if trial.predicted is None else f"predicted {_us(trial.predicted)}, "
        lines.append(f"    tried {_shown(trial.choice)}: {foreseen}{found}")
    return lines


def _shown(choice: object) -> str:
    if isinstance(choice, str):
        return choice
    return " ".join(f"{name}={value}" for name, value in dump_config(choice).items())  # type: ignore[arg-type]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"
