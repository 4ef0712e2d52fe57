"""Runs of every suite drawn, and what a picture says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

from matplotlib.text import Text

from sk_triton.bench import plots, results

from .synthetic_results import some_results

SUITES = ("layer", "train", "model", "sweep", "host", "scaling")
OBJECTIONS = ("wrong result: sk_triton, NCHW in a case", "104% of the copy bandwidth", "3 tests failed")


def without_timings(run):
    """As the suite "host" leaves its records."""
    records = [
        dataclasses.replace(record, timing=None, warm=None, memory=None)
        for record in run.records
        if record.role != results.FLOOR
    ]
    return dataclasses.replace(run, records=tuple(records))


def a_run(suite, device_type="cuda", **options):
    if suite in ("layer", "train"):
        options = {"stages": (1, 3), **options}
    if device_type == "cpu":
        options = {"dtypes": ("fp32",), "batches": (1, 8), **options}
    if suite == "host":
        return without_timings(some_results(suite, device_type, **{"batches": (1,), **options}))
    return some_results(suite, device_type, **options)


class Figures(Mapping):
    """A run's pictures by name, drawn whenever they are asked for."""

    def __init__(self, run, all_forms=False):
        self._draw = plots.pictures(run, all_forms)

    def __getitem__(self, name):
        return self._draw[name]()

    def __iter__(self):
        return iter(self._draw)

    def __len__(self):
        return len(self._draw)


def drawn_texts(figure) -> list[Text]:
    """Every text that shows."""
    figure.draw_without_rendering()
    unseen: set[int] = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            unseen |= {
                id(label)
                for tick in axis.get_major_ticks()
                if not (ax.axison and low <= tick.get_loc() <= high)
                for label in (tick.label1, tick.label2)
            }
    texts = figure.findobj(lambda artist: isinstance(artist, Text))
    return [
        text for text in texts if text.get_visible() and text.get_text().strip() and id(text) not in unseen
    ]


def words(figure) -> str:
    return "\n".join(text.get_text() for text in drawn_texts(figure))


def box_of(text):
    """The text itself, without the badge around it."""
    box = Text.get_window_extent(text)
    return box.padded(-1.0)


def assert_texts_are_apart(figure):
    texts = [(text, box_of(text)) for text in drawn_texts(figure) if text.get_rotation() in (0, 90)]
    page = figure.bbox
    for text, box in texts:
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{text.get_text()!r} leaves the card"
    for (one, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not box.overlaps(other_box), f"{one.get_text()!r} and {other.get_text()!r} overlap"
