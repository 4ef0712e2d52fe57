"""What tuning gained, and what was predicted, in tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sk_triton.tuning.entries import Choice, Trial, dump_config

from ..model.validation import spearman
from .flow import Outcome
from .ranking import CANNOT_WIN, LEFT_OUT, Ranked
from .targets import Target

if TYPE_CHECKING:
    from rich.table import Table


def gained(outcomes: Sequence[Outcome]) -> Table:
    """One line per target: the analytic choice's time, the tuned one, and what was chosen."""
    from rich.table import Table

    table = Table(title="Tuned, times in µs from a cold L2")
    for title in ("unit", "launch"):
        table.add_column(title)
    for title in ("analytic", "tuned", "faster"):
        table.add_column(title, justify="right")
    table.add_column("choice")
    unit = None
    for outcome in outcomes:
        target, entry = outcome.target, outcome.entry
        if unit is not None and unit != target.unit:
            table.add_section()
        shown = "" if unit == target.unit else target.unit
        unit = target.unit
        note = f"{outcome.note} " if outcome.note else ""
        if outcome.is_known and entry is not None:
            batch = "" if entry.n == target.workload.n else f", at a batch of {entry.n}"
            note += f"(measured before{batch})"
        if entry is None:
            _add_row(table, shown, _name(target), "", "", "", note)
            continue
        before, after = entry.analytic_seconds, entry.tuned_seconds
        faster = f"{before / after - 1:.1%}" if entry.is_tuned and after else ""
        chosen = "analytic" if entry.choice is None else short(entry.choice)
        _add_row(table, shown, _name(target), _us(before), _us(after), faster, f"{chosen} {note}".rstrip())
    return table


def predicted(target: Target, trials: Sequence[Trial]) -> Table:
    """The candidates of a target by predicted time, those that are out at the end."""
    from rich.table import Table

    table = Table(title=f"{target.unit}: {_name(target)}", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("predicted µs", justify="right")
    table.add_column("candidate")
    table.add_column("out", style="red")
    ranked = sorted(trials, key=lambda trial: float("inf") if trial.predicted is None else trial.predicted)
    for rank, trial in enumerate(ranked, start=1):
        mark = " (analytic)" if trial.choice == target.choices[0] else ""
        place = "" if trial.dropped else str(rank)
        _add_row(table, place, _us(trial.predicted), short(trial.choice) + mark, trial.dropped)
    return table


def ranking(targets: Sequence[Target], ranked: Ranked) -> str:
    """What became of all candidates, in numbers."""
    dropped = [trial.dropped for target in targets for trial in ranked[target.key]]
    in_spaces = sum(len(target.space) for target in targets)
    unable = sum(text.startswith(CANNOT_WIN) for text in dropped)
    left = dropped.count(LEFT_OUT)
    good = dropped.count("")
    return (
        f"{len(targets)} launches and schedules with {in_spaces} choices, {len(dropped)} of them candidates: "
        f"{unable} cannot win and were not compiled, {good} ranked, {len(dropped) - unable - left - good} out, "
        f"{left} left by the budget"
    )


def correlations(outcomes: Iterable[Outcome]) -> list[str]:
    """Spearman's rank correlation of predicted and measured times: over all candidates, and within a target."""
    everything: list[tuple[float, float]] = []
    within = []
    for outcome in outcomes:
        trials = outcome.entry.trials if outcome.entry else ()
        pairs = [
            (t.predicted, t.measured) for t in trials if t.predicted is not None and t.measured is not None
        ]
        everything += pairs
        if (one := spearman(pairs)) is not None:
            within.append(one)
    overall = spearman(everything)
    if overall is None:
        return []
    lines = [
        f"rank correlation (Spearman) of predicted and measured times: {overall:.2f} over {len(everything)}"
    ]
    if within:
        lines.append(
            f"within a launch: {sum(within) / len(within):.2f} on average over {len(within)} launches"
        )
    return lines


def short(choice: Choice) -> str:
    """A config in a table's cell: its kernel, the flags that are set, and the numbers that are not 1."""
    if isinstance(choice, str):
        return choice
    fields = dump_config(choice)
    words = [fields.pop("kernel")]
    for name, value in fields.items():
        if value is True:
            words.append(name)
        elif value not in (False, 1):
            words.append(f"{name}={value}")
    return " ".join(words)


def _add_row(table: Table, *cells: str) -> None:
    """Adds cells as they are: what compilers and drivers say in brackets is no markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _name(target: Target) -> str:
    return target.kind if target.is_schedule else f"{target.kind} ({target.schedule})"


def _us(seconds: float | None) -> str:
    return f"{seconds * 1e6:.2f}" if seconds else ""
