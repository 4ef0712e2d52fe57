"""`report.html`: one page with everything that a report found, readable offline, by day and by night."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from .. import coverage, plots
from ..plots import style
from ..problems import complaints, in_one_line
from ..results import Results
from ..text_file import write_text
from ..verdict import Comparison, cells, comparisons, host_bound_note, losses, losses_count, speed_summary
from .file import Report

NAME = "report.html"
MAX_BYTES = 16 << 20
"""A page above this is not written: pictures are left out until it fits."""

CSS = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #57606a; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #9198a1; --alarm: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; }
td.number { text-align: right; white-space: nowrap; }
pre { border: 1px solid var(--line); padding: .8rem; overflow-x: auto; font-size: 12px; line-height: 1.35; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.soft { color: var(--soft); } .alarm { color: var(--alarm); font-weight: 600; }
"""


def write_page(report: Report, runs: Sequence[Results], folder: Path) -> list[str]:
    """Writes the page in one atomic step; returns the pictures that had to be left out, and why."""
    room = MAX_BYTES - sum(len(part.encode()) for part in _parts(report, runs, {}))
    pictures: dict[str, str] = {}
    left_out = []
    for run in runs:
        for name, data in plots.drawn(plots.pictures(run), _encoded):
            if isinstance(data, Exception):
                left_out.append(f"{run.suite}/{name} ({in_one_line(data)})")
                continue
            if len(data) > room:
                left_out.append(f"{run.suite}/{name} (the page is full)")
                continue
            room -= len(data) + PICTURE_OVERHEAD
            pictures[f"{run.suite}/{name}"] = data
    write_text("".join(_parts(report, runs, pictures)), folder / NAME)
    return left_out


PICTURE_OVERHEAD = 200
"""Bytes of markup around a picture, at most."""


def _encoded(_: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=style.DPI, facecolor=style.BACKGROUND)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _parts(report: Report, runs: Sequence[Results], pictures: dict[str, str]) -> Iterator[str]:
    stamp = report.stamp
    device = stamp.device if stamp else "no step has run"
    yield "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>sk_triton on {escape(device)}</title><style>{CSS}</style></head><body>\n"
    yield f"<h1>sk_triton on {escape(device)}</h1>\n"
    if stamp:
        commit = f"commit {stamp.git_commit[:9]}" if stamp.git_commit else "no commit"
        changes = " with uncommitted changes" if stamp.git_dirty else ""
        software = (
            f"torch {stamp.torch}, Triton {stamp.triton or 'not installed'}, driver {stamp.driver or 'none'}"
        )
        yield f"<p class='soft'>{escape(f'{software}, {commit}{changes}, {stamp.date}')}</p>\n"
        if stamp.device_type == "cpu":
            yield _alarm(
                "No GPU: sk_triton runs PyTorch's operators here. Nothing on this page is a GPU's time."
            )
    yield from _verdicts(report, runs)
    yield from _steps(report)
    for run in runs:
        yield from _suite(run, pictures)
    for title, text in report.evidence.items():
        yield f"<h2>{escape(title)}</h2>\n"
        yield f"<pre>{escape(text)}</pre>\n"
    if report.environment:
        yield f"<h2>Environment</h2>\n<pre>{escape(chr(10).join(report.environment))}</pre>\n"
    yield "</body></html>\n"


def _verdicts(report: Report, runs: Sequence[Results]) -> Iterator[str]:
    tests = report.tests
    if tests is None:
        yield "<p>Tests: not run.</p>\n"
    else:
        counts = f"{tests.passed} passed, {tests.failed} failed, {tests.skipped} skipped"
        words = f"Tests ({tests.command}): {counts}{'' if tests.complete else ', stopped before the end'}."
        yield f"<p>{escape(words)}</p>\n" if tests.green else _alarm(words)
    yield "<ul>\n"
    for run in runs:
        summary = speed_summary(comparisons(run))
        words = (summary or "nothing to compare") if run.sound else "no speed is claimed"
        if summary and run.sound and (missing := coverage.sentence(run)):
            words += f". {missing}"
        yield f"<li>{escape(f'{run.suite}: {words}')}</li>\n"
    yield "</ul>\n"


def _steps(report: Report) -> Iterator[str]:
    if not report.steps:
        return
    yield "<h2>Steps</h2>\n<table><tr><th>step</th><th>ended</th><th>seconds</th><th>date</th><th></th></tr>\n"
    for name, state in report.steps.items():
        cells = f"<td>{escape(name)}</td><td>{escape(state.status)}</td><td class='number'>{state.seconds:.0f}</td>"
        yield f"<tr>{cells}<td>{escape(state.date)}</td><td>{escape(state.message or '')}</td></tr>\n"
    yield "</table>\n"


def _suite(run: Results, pictures: dict[str, str]) -> Iterator[str]:
    yield f"<h2>{escape(run.suite)}</h2>\n"
    if run.interrupted:
        yield _alarm("The run was interrupted.")
    for objection in run.objections:
        yield _alarm(f"No speed is claimed: {objection}")
    for note in run.notes:
        yield f"<p class='soft'>{escape(note)}</p>\n"
    found = [f"{complaint.status}: {complaint.words}" for complaint in complaints(run.records)]
    if found:
        yield f"<ul class='alarm'>\n{''.join(f'<li>{escape(line)}</li>' for line in found)}\n</ul>\n"
    for key, data in pictures.items():
        suite, _, name = key.partition("/")
        if suite == run.suite:
            yield f"<img alt='{escape(name, quote=True)}' src='data:image/png;base64,{data}'>\n"
    compared = [comparison for comparison in comparisons(run) if comparison.ours.timing or comparison.peer]
    if compared:
        heads = ("case", "sk_triton, ms", "fastest measured peer, ms", "speed", "of the memory floor")
        yield f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>\n"
        yield from (_row(run, comparison) for comparison in compared)
        yield "</table>\n"
        if note := host_bound_note(run, compared):
            yield f"<p class='soft'>{escape(note)}</p>\n"
        lost = losses(compared)
        if lost and run.sound:
            yield f"<p>Behind in {escape(losses_count(compared))}:</p>\n<ul>\n"
            yield from (f"<li>{escape(line)}</li>\n" for line in lost)
            yield "</ul>\n"


def _row(run: Results, comparison: Comparison) -> str:
    title, *numbers = cells(run, comparison, comparison.ours.label)
    row = "".join(f"<td class='number'>{escape(number)}</td>" for number in numbers)
    return f"<tr><td>{escape(title)}</td>{row}</tr>\n"


def _alarm(words: str) -> str:
    return f"<p class='alarm'>{escape(words)}</p>\n"
