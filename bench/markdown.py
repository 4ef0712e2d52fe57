"""A run as a table in Markdown."""

from __future__ import annotations

from .results import Results
from .verdict import Comparison, cells, comparisons, host_bound_note


def markdown_table(run: Results) -> str:
    """One row for each case; without speed-ups, and saying why, where no speed may be claimed."""
    compared = comparisons(run)
    lines = [
        "| case | sk_triton, ms | fastest measured peer, ms | speed-up | share of the memory floor |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(run, comparison) for comparison in compared]
    if note := host_bound_note(run, compared):
        lines += ["", note]
    if not run.sound:
        lines += ["", f"**No speed is claimed:** {'; '.join(run.objections)}"]
    return "\n".join(lines) + "\n"


def _row(run: Results, comparison: Comparison) -> str:
    title, ours, peer, speedup, share = cells(run, comparison, comparison.ours.form_label)
    if run.sound and comparison.is_beyond_noise:
        speedup = f"**{speedup}**"
    row = (title, ours, peer, speedup, share)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
