"""Which records a picture shows, and how its legend names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .. import results
from ..results import SAVING_INPUT, SK_TRITON, Record
from ..shapes import Case
from . import style
from .card import Entry

Groups = dict[Case, list[Record]]
Key = Callable[[Record], float | None]
"""What is drawn of a record, the least of it being best; None for a record that has none."""


def median_ms(record: Record) -> float | None:
    return record.timing.median_ms if record.timing else None


def peak_in_channels_last(record: Record) -> float | None:
    """Of one memory format alone: a conversion to the other is not the unit's memory."""
    return record.memory.peak_bytes if record.memory and style.CHANNELS_LAST in record.form else None


def shown(records: list[Record], all_forms: bool, key: Key = median_ms) -> list[Record]:
    """The records of one case to show: each source's best form by what is drawn, or everything.

    Forced schedules stand beside sk_triton's own choice only where everything is shown; what saves the input alone
    always does, for its memory. The floor is no competitor.
    """
    competing = [record for record in records if record.role != results.FLOOR]
    if all_forms:
        return competing
    if any(record.source == SK_TRITON for record in competing):
        competing = [record for record in competing if not _is_forced(record)]
    sources = dict.fromkeys(record.source for record in competing)
    return [_best([record for record in competing if record.source == source], key) for source in sources]


def _is_forced(record: Record) -> bool:
    return record.ours and record.source.startswith("ours-") and record.source != SAVING_INPUT


def series(groups: Iterable[list[Record]]) -> dict[str, list[Record]]:
    """Records of several cases by source, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for records in groups:
        for record in records:
            found.setdefault(record.source, []).append(record)
    return found


def bar_legends(records: Iterable[Record]) -> list[list[Entry]]:
    """Colours name the sources in one line, hatches the forms in the next."""
    records = list(records)
    sources = {record.source_label: Patch(facecolor=style.colour(record.source)) for record in records}
    return [_entries(sources), _form_entries(records, is_line=False)]


def line_legends(records: Iterable[Record], floor: Record | None) -> list[list[Entry]]:
    """Colours name the sources in one line, markers the forms in the next; `floor`: a record of it, if it is drawn."""
    records = list(records)
    sources = {
        record.source_label: Line2D([], [], color=style.colour(record.source), linewidth=line_width(record))
        for record in records
    }
    if floor:
        sources[floor.source_label] = Line2D([], [], **FLOOR_LINE)
    return [_entries(sources), _form_entries(records, is_line=True)]


FLOOR_LINE: dict[str, Any] = {
    "color": style.FAMILY_COLOURS["copy"],
    "linewidth": 1.1,
    "linestyle": (0, (4, 2)),
}


def line_width(record: Record) -> float:
    return 2.4 if record.ours else 1.4


def _best(records: list[Record], key: Key) -> Record:
    drawn = [(value, index) for index, record in enumerate(records) if (value := key(record)) is not None]
    return records[min(drawn)[1]] if drawn else records[0]


def _form_entries(records: list[Record], is_line: bool) -> list[Entry]:
    forms: dict[str, Patch | Line2D] = {}
    for record in sorted(records, key=lambda record: style.form_order(record.form)):
        if is_line:
            look: dict[str, Any] = {
                **style.marker_style("copy", record.form),
                "linestyle": "none",
                "markersize": 5,
            }
            forms[record.form_label] = Line2D([], [], **look)
        else:
            forms[record.form_label] = Patch(**style.bar_style("copy", record.form))
    return _entries(forms)


def _entries(handles: dict[str, Patch] | dict[str, Line2D] | dict[str, Patch | Line2D]) -> list[Entry]:
    return [(handle, label) for label, handle in handles.items() if label]
