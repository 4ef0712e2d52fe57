"""A run as a table in Markdown."""

from __future__ import annotations

from .results import Results
from .verdict import HOST_BOUND, Comparison, cells, comparisons


def markdown_table(run: Results) -> str:
    """One row for each case; without speed-ups, and saying why, where no speed may be claimed."""
    compared = comparisons(run)
    lines = [
        "| case | sk_triton, ms | fastest measured peer, ms | speed-up | share of the memory floor |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(run, comparison) for comparison in compared]
    if run.sound and any(comparison.is_peer_host_bound for comparison in compared):
        lines += [
            "",
            f"{HOST_BOUND}: out of a CUDA graph, the device waits for the host; sk_triton is in a graph.",
        ]
    if not run.sound:
        lines += ["", f"**No speed is claimed:** {'; '.join(run.objections)}"]
    return "\n".join(lines) + "\n"


def _row(run: Results, comparison: Comparison) -> str:
    title, ours, peer, speedup, share = cells(
        run, comparison, comparison.ours.form_label, _peer_name(comparison)
    )
    if run.sound and comparison.is_beyond_noise:
        speedup = f"**{speedup}**"
    row = (title, ours, peer, speedup, share)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _peer_name(comparison: Comparison) -> str:
    if comparison.peer is None:
        return ""
    return (
        f"{comparison.peer.label}; {HOST_BOUND}" if comparison.is_peer_host_bound else comparison.peer.label
    )
