"""sk_triton against other revisions of it that ran in the same rounds: a comparison of its own, beside the peers'."""

from __future__ import annotations

from dataclasses import dataclass

from .results import REVISION, Record, Results, fastest_ours
from .verdict import (
    Comparison,
    cases_in_order,
    losses,
    losses_count,
    sk_triton_records,
    speed_summary,
)


@dataclass(frozen=True)
class Verdict:
    """sk_triton's speed against one revision in a sentence, and a line for each case in which it is slower."""

    summary: str
    slower: list[str]


def against_revisions(run: Results) -> list[Verdict]:
    """One for each revision that was timed, both in their fastest form in each case."""
    found: dict[str, list[Comparison]] = {}
    for case, records in cases_in_order(run).items():
        ours = sk_triton_records(records)
        for source, timed in _timed_revisions(records).items():
            if ours:
                best = min(timed, key=lambda record: record.timing.median_ms if record.timing else 0.0)
                compared = Comparison(case, fastest_ours(ours) or ours[0], best, None)
                found.setdefault(source, []).append(compared)
    return [_verdict(compared) for compared in found.values()]


def _timed_revisions(records: list[Record]) -> dict[str, list[Record]]:
    """By source; where it was not timed there is nothing to compare with."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.role == REVISION and record.timing:
            found.setdefault(record.source, []).append(record)
    return found


def _verdict(compared: list[Comparison]) -> Verdict:
    revision = compared[0].peer
    assert revision is not None
    label = revision.source_label
    nothing = f"no case in common with {label}, behind in {losses_count(compared)}"
    return Verdict(speed_summary(compared, label) or nothing, losses(compared))
