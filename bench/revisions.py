"""sk_triton against other revisions of it that ran in the same rounds: a comparison of its own, beside the peers'."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import geometric_mean

from .formats import ratio
from .results import REVISION, Record, Results, fastest_ours
from .verdict import Comparison, cases_in_order, losses, losses_count, sk_triton_records


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
    ratios = [comparison.speedup for comparison in compared if comparison.speedup is not None]
    if not ratios:
        words = "no case that both ran"
    elif not any(comparison.is_beyond_noise for comparison in compared):
        words = "no difference beyond the noise"
    else:
        spread = f" ({ratio(min(ratios))} to {ratio(max(ratios))})" if len(ratios) > 1 else ""
        words = f"{ratio(geometric_mean(ratios))} its speed{spread}"
    missing = "" if len(ratios) == len(compared) else f" over {len(ratios)} of {len(compared)} cases"
    summary = f"against {revision.source_label}: {words}{missing}, slower in {losses_count(compared)}"
    return Verdict(summary, losses(compared))
