"""Where a picture's texts stand: inside the card, none over another, each as wide as it was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from matplotlib.text import Text

from sk_triton.bench import readme, results
from sk_triton.bench.plots import bars, card, units

from .drawn_pictures import OBJECTIONS, SUITES, Figures, a_run, assert_texts_are_apart, drawn_texts
from .synthetic_results import a_stamp, some_results, with_status


@pytest.mark.parametrize("suite", SUITES)
def test_no_label_overlaps_another_or_leaves_the_card_on_a_cpu(suite):
    """On a GPU: `test_bench_plots.py`."""
    for figure in Figures(a_run(suite, "cpu")).values():
        assert_texts_are_apart(figure)


def test_units_measured_launch_by_launch_are_apart():
    (file,) = readme.load_units(Path(__file__).resolve().parents[1])
    assert_texts_are_apart(units.draw(file.times))


def test_a_crowd_of_providers_is_still_apart():
    run = some_results(dtypes=("fp32",), stages=(1,), every=True)
    run = with_status(run, 3, results.OUT_OF_MEMORY)
    for figure in Figures(dataclasses.replace(run, objections=OBJECTIONS), all_forms=True).values():
        assert_texts_are_apart(figure)


def test_host_costs_of_many_cases_are_still_apart():
    for figure in Figures(a_run("host", batches=(1, 8, 32, 128, 256))).values():
        assert_texts_are_apart(figure)


def test_long_names_are_wrapped():
    stamp = a_stamp(device="A Very Long Name of a Graphics Processing Unit " * 3, driver="1.2.3 " * 12)
    run = some_results(stages=(1,), batches=(1, 8), stamp=stamp, objections=("an objection " * 40,))
    for figure in Figures(run).values():
        assert_texts_are_apart(figure)


def test_the_overlap_check_sees_an_overlap():
    figure = next(iter(Figures(some_results(stages=(1,))).values()))
    figure.text(0.1, 0.9, "a new label")
    figure.text(0.12, 0.9, "another label")
    with pytest.raises(AssertionError, match="overlap"):
        assert_texts_are_apart(figure)


def test_text_is_measured_as_it_is_drawn():
    figure = next(iter(Figures(some_results(stages=(1,))).values()))
    text = figure.text(0.5, 0.5, "A label of some length, 128@56²", fontsize=8)
    inches = Text.get_window_extent(text, figure.canvas.get_renderer()).width / figure.dpi
    assert card.text_width(text.get_text(), 8) == pytest.approx(inches, rel=0.05)


def test_a_bar_without_room_keeps_its_number_only_if_it_matters():
    run = some_results(stages=(1,), batches=(8,))
    record = run.records[0]
    group = [bars.Bar(record, 1.0, f"{n}{n}{n}", important=n == 7) for n in range(10)]
    figure, ((ax,),) = card.draw_card(card.Words("t", "s", [["f"]]), [], card.Grid((1.0,)))
    bars.draw_bars(ax, [group] * 12, 6.0)
    shown = {text.get_text() for text in drawn_texts(figure)} & {bar.number for bar in group}
    assert shown == {"777"}
