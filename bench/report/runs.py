"""The suites' results files in a report's folder: what is read, kept and judged anew of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import results, suites
from ..measuring.guards import judged
from ..results import Results, Tests
from ..shapes import Case

if TYPE_CHECKING:
    from ..measuring.session import SuiteRequest


def file_of(folder: Path, suite: str) -> Path:
    """Where a suite's results are."""
    return folder / f"{suite}.json"


def load_runs(folder: Path) -> list[Results]:
    """The suites' results in a folder, in the steps' order."""
    paths = [file_of(folder, suite) for suite in suites.OPTIONS]
    return [results.read(path) for path in paths if path.exists()]


def earlier(folder: Path, request: SuiteRequest, own: set[Case], again: bool) -> Results | None:
    """What the suite's file holds beside a step's `own` cases, where those are measured `again`, and else with them.

    Raises:
        ValueError: it was measured in another way, and nobody asked to replace it.
    """
    from ..measuring import session

    if request.suite == suites.HOST:
        return None
    try:
        found = session.reusable(file_of(folder, request.suite), request)
    except ValueError as error:
        if again:
            return None
        raise ValueError(f"{error}: take another --output, or --again to replace it") from None
    if found is None or not again:
        return found
    kept = tuple(record for record in found.records if record.case not in own)
    return replace(found, records=kept, clocks=(), notes=found.notes if kept else ())


def judge_anew(folder: Path, tests: Tests) -> None:
    """Puts the tests' result into the suites' files that were measured at the same commit."""
    for run in load_runs(folder):
        if run.stamp.git_commit == tests.git_commit:
            results.save(judged(replace(run, tests=tests)), file_of(folder, run.suite))
