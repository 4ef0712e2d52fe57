"""The pictures that compare several runs."""

from __future__ import annotations

import dataclasses

import pytest
from matplotlib.figure import Figure

from sk_triton.bench import plots
from sk_triton.bench.plots import several
from sk_triton.bench.shapes import PAPER

from .drawn_pictures import OBJECTIONS, assert_texts_are_apart, words
from .synthetic_results import a_stamp, some_results


def test_runs_are_told_apart_by_what_differs():
    first, second = a_stamp(), a_stamp(device="AMD Instinct MI300X")
    third = a_stamp(git_commit="1234567890abcdef")
    runs = {stamp: some_results(stages=(1,), batches=(1,), stamp=stamp) for stamp in (first, second, third)}
    assert several.labels([runs[first], runs[second]]) == ["NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"]
    assert several.labels([runs[first], runs[third]]) == ["478cb1a0c", "123456789"]
    assert several.labels([runs[first], runs[second], runs[third]])[2] == "NVIDIA H100 80GB HBM3, 123456789"
    assert len(set(several.labels([runs[first], runs[first]]))) == 2


def test_several_runs_are_compared_where_they_share_cases(tmp_path):
    slow, fast = (
        some_results(stages=(1, 3), batches=(1, 8)),
        some_results(stages=(3,), batches=(8,), faster=2.0),
    )
    fast = dataclasses.replace(fast, stamp=a_stamp(device="Faster Device"))
    best = several.shared_cases([slow, fast])
    assert {(case.shape.name, case.batch) for case in best} == {("512@14²", 8)}
    chosen = {case: records for case, records in best.items() if case.subject == PAPER}
    figure = several.draw([slow, fast], chosen)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights[0] == pytest.approx(1)
    assert heights[1] > 1.5
    assert "Faster Device" in words(figure)
    assert_texts_are_apart(figure)
    assert len(list(plots.save_comparisons([slow, fast], tmp_path))) == 2
    assert list(plots.save_comparisons([slow, some_results("train", stages=(1,))], tmp_path)) == []


def test_a_run_of_another_suite_costs_a_comparison_nothing(tmp_path, monkeypatch):
    slow, fast = (some_results(stages=(3,), batches=(8,), faster=faster) for faster in (1.0, 2.0))
    drawn = []
    monkeypatch.setattr(several, "draw", lambda runs, best: drawn.append((runs, best)) or Figure())
    list(plots.save_comparisons([some_results("train", stages=(1,)), slow, fast], tmp_path))
    assert drawn
    for runs, best in drawn:
        assert runs == [slow, fast]
        assert all(len(records) == 2 and all(records) for records in best.values())


def test_an_objection_against_one_of_several_runs_ends_the_comparison():
    sound = some_results(stages=(1,), batches=(8,))
    doubted = dataclasses.replace(sound, objections=OBJECTIONS, stamp=a_stamp(device="Other"))
    best = {c: r for c, r in several.shared_cases([sound, doubted]).items() if c.subject == PAPER}
    text = words(several.draw([sound, doubted], best))
    assert "No speed is claimed" in text
    assert "= 1x" not in text
