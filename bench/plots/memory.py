"""Memory of every provider in activation tensors: its peak, and what is kept from the forward to the backward pass."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .. import results
from ..formats import byte_size
from ..results import Record, Results
from . import style
from .bars import Bar
from .captions import unit_title, words
from .card import draw_card
from .selection import Groups, bar_legends, peak_in_channels_last, shown
from .stages import draw_stages, stage_grid


def draw(run: Results, groups: Groups, all_forms: bool) -> Figure:
    """One panel for each shape, in it a group of bars for each batch: light the peak, full what is saved.

    Of each source the form in channels_last with the least peak, among those that were weighed: graphs never are.
    """
    chosen = {case: _shown(records, all_forms) for case, records in groups.items()}
    bars = {case: [_bar(record) for record in records] for case, records in chosen.items()}
    grid = stage_grid(bars, below=0.34)
    legends = bar_legends(record for records in chosen.values() for record in records)
    if any(bar.inner is not None for group in bars.values() for bar in group):
        grey = style.FAMILY_COLOURS["copy"]
        peak = (Patch(facecolor=style.tint(grey, style.PEAK_TINT)), "peak during a call")
        legends.append([peak, (Patch(facecolor=grey), "of it saved from forward for backward")])
    reading = "lower is better · in activation tensors (T), beyond input and parameters; number: peak"
    if not all_forms:
        reading += " · each source's form with the least peak, in channels_last, out of CUDA graphs"
    text = words(run, f"{unit_title(next(iter(groups)))}: memory", reading, list(groups))
    figure, rows = draw_card(text, legends, grid)
    draw_stages(rows, grid, bars, "activation tensors", "{:g} T".format)
    return figure


def _shown(records: list[Record], all_forms: bool) -> list[Record]:
    chosen = shown(records, all_forms, peak_in_channels_last)
    if not all_forms:
        return chosen
    return [record for record in chosen if record.memory or record.status != results.OK]


def _bar(record: Record) -> Bar:
    memory, tensor = record.memory, record.case.tensor_bytes
    if memory is None:
        return Bar(record, None, absent="not weighed")
    saved = memory.saved_bytes / tensor if memory.saved_bytes is not None else None
    return Bar(
        record, memory.peak_bytes / tensor, byte_size(memory.peak_bytes), important=record.ours, inner=saved
    )
