"""The progress bar of a run, with the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[int, str, float], None]


@contextmanager
def case_progress(console: Console, cases: int) -> Iterator[Report]:
    """Yields `report(finished cases, title of the current one, its finished share)`; goes away at the end."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        # Cases differ in cost: a long window keeps the estimate from jumping with each of them.
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=120,
    )
    with progress:
        task = progress.add_task("starting", total=cases)
        yield lambda done, title, share: progress.update(task, completed=done + share, description=title)
