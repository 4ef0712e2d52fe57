"""How many times sk_triton's time each peer takes: a table of all stages, by how the peers are run."""

from __future__ import annotations

from collections.abc import Sequence

from . import results
from .formats import NOTHING, ratio
from .measuring.forms import BY_KEY
from .results import PEER, Record, Results
from .shapes import DIRECTIONS, STAGES, Case
from .suites import LAYER, TRAIN
from .verdict import sk_triton_records

Peer = tuple[str, str]
"""The unit that is computed, and who computes it: plain PyTorch has one for each unit."""

BATCH = 128
WAYS = ("eager", "CUDA graph", "torch.compile")
"""How a peer is run, each in its fastest form: eager in either memory format; its kernels in a graph; compiled, in a
graph or not."""


def peer_table(runs: Sequence[Results], dtype: str) -> str:
    """A row for each direction, peer and way that suites "layer" and "train" timed at batch `BATCH` on one device, a
    column for each stage of SKNet-50; "" where nothing was."""
    columns = list(STAGES.values())
    peers: dict[Peer, int] = {}
    rows: dict[tuple[str, Peer, str], dict[tuple[int, int], str]] = {}
    for run in runs:
        for case, records in results.by_case(run.records).items():
            size = case.shape.channels, case.shape.height
            ours = results.fastest_ours(sk_triton_records(records))
            if not _is_shown(case, dtype) or ours is None or ours.timing is None:
                continue
            for way in WAYS:
                for label, median in _peer_medians(records, way).items():
                    peer = case.subject, label
                    peers.setdefault(peer, len(peers))
                    row = rows.setdefault((case.direction, peer, way), {})
                    row[size] = ratio(median / ours.timing.median_ms)

    def place(row: tuple[str, Peer, str]) -> tuple[int, int, int]:
        return DIRECTIONS.index(row[0]), peers[row[1]], WAYS.index(row[2])

    if not rows:
        return ""
    titles = [f"{channels} @ {height}²" for channels, height in columns]
    lines = [f"| {' | '.join(['peer', *titles])} |", "|---" * (1 + len(columns)) + "|"]
    labels = [label for _, label in peers]
    names = {
        (subject, label): f"{label} ({subject})" if labels.count(label) > 1 else label
        for subject, label in peers
    }
    lines += [
        f"| {' | '.join([f'{names[peer]}, {way}, {direction}', *(row.get(size, NOTHING) for size in columns)])} |"
        for (direction, peer, way), row in sorted(rows.items(), key=lambda item: place(item[0]))
    ]
    return "\n".join(lines) + "\n"


def _is_shown(case: Case, dtype: str) -> bool:
    return case.suite in (LAYER, TRAIN) and case.batch == BATCH and case.dtype == dtype


def _peer_medians(records: Sequence[Record], way: str) -> dict[str, float]:
    """The fastest median of each peer in a way of running it."""
    found: dict[str, float] = {}
    for record in records:
        if record.role == PEER and record.timing and _way(record) == way:
            median = record.timing.median_ms
            found[record.source_label] = min(median, found.get(record.source_label, median))
    return found


def _way(record: Record) -> str | None:
    form = BY_KEY.get(record.form)
    if form is None:
        return None
    return WAYS[2] if form.is_compiled else WAYS[1] if form.is_graph else WAYS[0]
