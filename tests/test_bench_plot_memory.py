"""The pictures of memory."""

from __future__ import annotations

import dataclasses

from sk_triton.bench import results
from sk_triton.bench.plots import style
from sk_triton.bench.shapes import PAPER

from .drawn_pictures import Figures, words
from .synthetic_results import some_results


def least_peaks(run, subject=PAPER):
    """The least peak of each source in channels_last, in activation tensors."""
    records = [r for r in run.records if r.case.subject == subject and r.memory and "channels_last" in r.form]
    peaks = {}
    for record in records:
        peaks.setdefault(record.source, []).append(record.memory.peak_bytes / record.case.tensor_bytes)
    return {source: min(found) for source, found in peaks.items()}


def test_memory_stands_in_activation_tensors():
    """Of every source, though the fastest form of each is a graph, which nobody weighs."""
    run = some_results("train", stages=(1,), batches=(8,))
    figure = Figures(run)[f"memory-{PAPER}-fp16"]
    records = [record for record in run.records if record.case.subject == PAPER]
    assert results.fastest_ours(records).memory is None
    heights = {round(patch.get_height(), 3) for patch in figure.axes[0].patches}
    assert {*least_peaks(run)} == {"timm", "paper", "ours", "ours-input"}
    assert {round(peak, 3) for peak in least_peaks(run).values()} <= heights
    ours = results.fastest_ours([record for record in records if record.memory])
    assert round(ours.memory.saved_bytes / ours.case.tensor_bytes, 3) in heights
    text = words(figure)
    assert "saved from forward for backward" in text
    assert "ok" not in text.splitlines()
    assert "NCHW" not in text.partition("Not measured")[0]


def test_what_nobody_weighed_is_said():
    run = some_results("train", stages=(1,), batches=(8,))
    records = tuple(dataclasses.replace(r, memory=None) if r.source == "timm" else r for r in run.records)
    lines = words(Figures(dataclasses.replace(run, records=records))[f"memory-{PAPER}-fp16"]).splitlines()
    assert "not weighed" in lines
    assert "ok" not in lines


def test_memory_of_every_form_is_that_of_the_forms_that_were_weighed():
    run = some_results("train", stages=(1,), batches=(8,))
    text = words(Figures(run, all_forms=True)[f"memory-{PAPER}-fp16"]).partition("Not measured")[0]
    assert "NCHW" in text
    assert "CUDA graph" not in text
    assert "not weighed" not in text


def test_scaling_shows_the_memory_of_every_source():
    run = some_results("scaling")
    figure = Figures(run)[f"growth-{PAPER}-fp16"]
    time, memory = figure.axes[0], figure.axes[3]
    assert "peak memory" in memory.get_title(loc="left")
    for ax in (time, memory):
        assert {line.get_markeredgecolor() for line in ax.lines if len(line.get_xdata()) == 1} == {
            style.colour(source) for source in ("timm", "paper", "ours")
        }
