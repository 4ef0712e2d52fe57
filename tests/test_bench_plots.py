"""The pictures of a run: colours, words and what stands beside what."""

from __future__ import annotations

import dataclasses
import random

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from sk_triton.bench import plots, results
from sk_triton.bench.measuring import forms
from sk_triton.bench.plots import roofline, scaling, style
from sk_triton.bench.results import SAVING_INPUT
from sk_triton.bench.shapes import CLASSIC, PAPER

from .drawn_pictures import (
    OBJECTIONS,
    SUITES,
    Figures,
    a_run,
    assert_texts_are_apart,
    drawn_texts,
    words,
)
from .synthetic_results import FORMS, SOURCES, a_stamp, some_results, with_status


@pytest.mark.parametrize("suite", SUITES)
def test_pictures_are_opaque_and_show_every_source_in_its_colour_and_every_label(suite, tmp_path):
    run = a_run(suite)
    for name, figure in Figures(run).items():
        assert_texts_are_apart(figure)
        picture = imread(plots.save_picture(figure, tmp_path / "picture.png"))
        assert picture.shape[1] == 1650
        assert picture.shape[2] == 3 or picture[..., 3].min() == 1
        colours, pixels = np.unique((255 * picture[..., :3]).round() @ (2**16, 2**8, 1), return_counts=True)
        colours = colours[:, None] // (2**16, 2**8, 1) % 2**8 / 255
        subject = next((unit for unit in (CLASSIC, PAPER) if f"-{unit}-" in name), None)
        records = [r for r in run.records if subject in (None, r.case.subject) and r.role != results.FLOOR]
        sources = {record.source for record in records}
        if name.startswith("roofline-"):
            sources.discard(SAVING_INPUT)  # sk_triton stands there once
        for source in sources:
            near = abs(colours - to_rgb(style.colour(source))).max(1) < 0.02
            assert pixels[near].sum() > 300, (name, source)


def test_saved_pictures_are_named_by_suite_and_device(tmp_path):
    run = a_run("scaling")
    names = {path.name for _, path in plots.save_plots(run, tmp_path)}
    assert names == {f"scaling-cuda-{name}.png" for name in plots.pictures(run)}


def test_drawing_leaves_no_global_state():
    before = dict(matplotlib.rcParams)
    figure = next(iter(Figures(some_results(stages=(1,))).values()))
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert dict(matplotlib.rcParams) == before


def test_every_source_has_a_colour_and_families_differ():
    assert all(style.colour(source) for source in SOURCES)
    assert len(set(style.FAMILY_COLOURS.values())) == len(style.FAMILY_COLOURS)
    ours = [
        style.colour(source) for source in SOURCES if source.startswith("ours") and source != "ours-reference"
    ]
    assert len(set(ours)) == len(ours)
    with pytest.raises(ValueError, match="got 'stranger'"):
        style.colour("stranger")


def test_every_form_has_its_own_hatch_and_marker():
    assert len({style.hatch(form) for form in FORMS}) == len(FORMS)
    looks = {tuple(style.marker_style("timm", form).values()) for form in FORMS}
    assert len(looks) == len(FORMS)
    with pytest.raises(ValueError, match="got 'jit-nchw'"):
        style.hatch("jit-nchw")


def test_a_picture_says_device_dtype_and_stamp():
    for figure in Figures(some_results(dtypes=("bf16",), stages=(1, 3), batches=(1, 8))).values():
        text = words(figure)
        if "counted, not measured" in text:
            continue
        expected = ("NVIDIA H100", "bf16", "higher is faster", "torch 2.15.0", "triton 3.9.0", "478cb1a0c")
        assert all(word in text for word in (*expected, "driver 580.65.06", "TF32", "2026-11-22"))
        assert "Measured on a CPU" not in text


def test_a_cpu_picture_says_so():
    run = some_results(device_type="cpu", dtypes=("fp32",), stages=(1,), batches=(1,))
    for name, figure in Figures(run).items():
        assert ("Measured on a CPU" in words(figure)) == (name != plots.PASSES)


def test_the_speed_picture_prints_times_and_the_speed_against_the_fastest_peer():
    run = some_results(stages=(1,), batches=(8,))
    records = [record for record in run.records if record.case.subject == PAPER]
    peer, ours = results.fastest_peer(records), results.fastest_ours(records)
    text = words(Figures(run)[f"speed-{PAPER}-fp16"])
    assert f"{peer.timing.median_ms / ours.timing.median_ms:.2f}x" in text
    assert f"{ours.timing.median_ms * 1e3:#.3g}" in text
    assert f"{peer.timing.median_ms * 1e3:#.3g}" in text
    assert "stage 1: 128@56²" in text


@pytest.mark.parametrize("suite", SUITES)
def test_objections_are_shown_and_end_all_comparisons(suite):
    run = a_run(suite, stages=(1,), batches=(8,), objections=OBJECTIONS)
    for name, figure in Figures(run).items():
        text = words(figure)
        if name == plots.PASSES:
            continue
        flat = text.replace("\n", " ")
        assert f"No speed is claimed: {OBJECTIONS[0]}; {OBJECTIONS[1]}; and 1 more." in flat
        assert "fastest peer =" not in text
        assert "the speed of" not in text
        assert not [
            t
            for t in drawn_texts(figure)
            if t.get_text().rstrip("x").replace(".", "").isdigit() and "x" in t.get_text()
        ]
        assert "share of the roof" not in text


def test_the_red_badge_shows_in_the_picture(tmp_path):
    sound = some_results(stages=(1,), batches=(8,))
    reds = []
    for run in (sound, dataclasses.replace(sound, objections=OBJECTIONS)):
        picture = imread(next(plots.save_plots(run, tmp_path))[1])[..., :3].reshape(-1, 3)
        reds.append((abs(picture - to_rgb(style.BADGES["alarm"][0])).max(1) < 0.02).sum())
    assert reds[0] < 100
    assert reds[1] > 10_000


@pytest.mark.parametrize("status", [results.WRONG, results.FAILED, results.OUT_OF_MEMORY, results.SKIPPED])
def test_a_provider_without_a_time_says_why(status):
    run = some_results(stages=(1,), batches=(8,))
    position = next(i for i, record in enumerate(run.records) if record.case.subject == PAPER)
    text = words(Figures(with_status(run, position, status), all_forms=True)[f"speed-{PAPER}-fp16"])
    assert status in text.splitlines()


def test_the_default_shows_the_fastest_form_of_each_source_and_all_forms_everything():
    run = some_results(stages=(1,), batches=(8,), every=True)
    name = f"speed-{PAPER}-fp16"
    few, every = (words(Figures(run, all_forms)[name]) for all_forms in (False, True))
    assert all(forms.EVERY[form].label in every for form in FORMS)
    assert "sk_triton, resident" in every
    assert "sk_triton, resident" not in few
    assert sum(forms.EVERY[form].label in few.splitlines() for form in FORMS) <= 3


def test_cases_are_ordered_however_they_were_measured():
    run = some_results(batches=(1, 8, 32), stages=(1, 2))
    records = list(run.records)
    random.Random(1).shuffle(records)
    name = f"throughput-{PAPER}-fp16"
    ordered, shuffled = (Figures(r)[name] for r in (run, dataclasses.replace(run, records=tuple(records))))
    for one, other in zip(ordered.axes, shuffled.axes, strict=True):
        assert one.get_title(loc="left") == other.get_title(loc="left")
        assert all(list(line.get_xdata()) == sorted(line.get_xdata()) for line in other.lines)


def test_the_floor_is_drawn_above_every_line_of_the_throughput():
    figure = Figures(some_results(stages=(1,)))[f"throughput-{PAPER}-fp16"]
    (ax,) = figure.axes
    floors = [line for line in ax.lines if line.get_color() == style.FAMILY_COLOURS["copy"]]
    assert len(floors) == 1
    others = [line for line in ax.lines if line is not floors[0]]
    assert max(floors[0].get_ydata()) > max(max(line.get_ydata()) for line in others)


def test_a_single_batch_has_no_line_of_throughput():
    assert not [name for name in plots.pictures(some_results(batches=(8,))) if name.startswith("throughput")]
    assert [name for name in plots.pictures(some_results(batches=(1, 8))) if name.startswith("throughput")]
    run = some_results("train", stages=(1,), batches=(1, 8))
    text = words(Figures(run)[f"throughput-{PAPER}-fp16"])
    assert "memory floor: 5 passes" in text
    assert "copy of the input" not in text


def test_a_roofline_of_one_batch_has_large_markers():
    def sizes(*batches):
        figure = Figures(some_results(stages=(1,), batches=batches))["roofline-inference-fp16"]
        return {line.get_markersize() for line in figure.axes[0].lines if line.get_marker() == "o"}

    assert sizes(8) == {roofline.LARGEST}
    assert sizes(1, 8) == {roofline.SMALLEST, roofline.LARGEST}


def test_a_speed_that_only_a_graph_reached_is_marked():
    name = f"speed-{PAPER}-fp16"
    run = some_results(stages=(1,), batches=(8,))
    assert "*" not in words(Figures(run)[name])
    bare = dataclasses.replace(run, records=tuple(r for r in run.records if r.ours or "graph" not in r.form))
    text = words(Figures(bare)[name])
    assert "x*" in text
    assert "*: sk_triton in a CUDA graph" in text


def test_a_picture_has_the_notes_on_its_own_cases():
    commits = {CLASSIC: "1111111", PAPER: "2222222"}
    run = some_results(stages=(1,), batches=(8,))
    records = tuple(dataclasses.replace(r, commit=commits[r.case.subject]) for r in run.records)
    notes = ("of all", *(f"{commit}: of {subject}" for subject, commit in commits.items()))
    drawn = Figures(dataclasses.replace(run, records=records, notes=notes))
    for subject, other in ((CLASSIC, PAPER), (PAPER, CLASSIC)):
        text = words(drawn[f"speed-{subject}-fp16"])
        assert "of all" in text
        assert f"at {commits[subject]}: {subject} 128@56² batch 8" in text
        assert f"{commits[subject]}: of {subject}" in text
        assert commits[other] not in text


def test_host_costs_on_a_cpu_say_that_no_kernel_ran():
    text = words(Figures(a_run("host", "cpu", stages=(1,)))[f"calls-{PAPER}-fp32"]).replace("\n", " ")
    assert "launches stubbed out, so that no kernel runs" in text
    assert "where sk_triton runs PyTorch operators" not in text


def test_a_copy_at_the_measured_bandwidth_reaches_the_roof():
    run = some_results(stages=(1,), batches=(128,))
    record = next(
        record for record in run.records if record.role == results.FLOOR and record.case.subject == PAPER
    )
    ms = record.case.floor_passes * record.case.tensor_bytes / run.ceilings.copy_bytes_per_s * 1e3
    exact = dataclasses.replace(record, timing=dataclasses.replace(record.timing, median_ms=ms))
    assert roofline.rate(exact) / roofline.ceiling(record.case, run.ceilings) == pytest.approx(1)
    slow = results.Ceilings(run.ceilings.copy_bytes_per_s, {"fp16": 1e9})
    assert roofline.ceiling(record.case, slow) == 1e9


def test_a_run_without_ceilings_has_no_roofline():
    assert not [name for name in plots.pictures(some_results(ceilings=None)) if name.startswith("roofline")]
    assert [name for name in plots.pictures(some_results()) if name.startswith("roofline")]


def test_a_dense_convolution_is_named_in_the_sweep():
    text = words(Figures(some_results("sweep"))[f"time-{PAPER}-fp16"])
    assert all(axis in text for axis in ("channels per group", "dilation", "kernel size", "branches"))
    assert "256\ndense" in text


def test_networks_show_images_per_second_in_both_directions():
    run = some_results("model", batches=(32,))
    trained = tuple(
        dataclasses.replace(record, case=dataclasses.replace(record.case, direction="training"))
        for record in run.records
    )
    drawn = Figures(dataclasses.replace(run, records=run.records + trained))
    assert set(drawn) == {"images-inference-fp16", "images-training-fp16"}
    fastest = results.fastest_ours([r for r in run.records if r.case.subject == "sknet50"])
    assert f"{fastest.samples_per_second:.0f}" in words(drawn["images-inference-fp16"])
    assert "forward and backward" in words(drawn["images-training-fp16"])


def test_host_costs_take_the_cheaper_memory_format():
    run = a_run("host", stages=(1,))
    records = [
        r for r in run.records if r.case.subject == PAPER and r.source == "ours" and "graph" not in r.form
    ]
    text = words(Figures(run)[f"calls-{PAPER}-fp16"])
    least, most = (f"{pick(r.host_us for r in records):#.3g}" for pick in (min, max))
    assert least in text
    assert most not in text


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_fitted_exponent_is_that_of_the_power(exponent):
    values = [1.0, 2.0, 8.0, 64.0]
    found, factor = scaling.fit_exponent(values, [3 * value**exponent for value in values])
    assert found == pytest.approx(exponent, abs=1e-12)
    assert factor == pytest.approx(3)


@pytest.mark.parametrize(
    ("values", "measures"), [([1, 1], [1, 2]), ([1, 2], [0, 1]), ([-1, 2], [1, 1]), ([1], [1])]
)
def test_a_fit_that_means_nothing_is_refused(values, measures):
    with pytest.raises(ValueError, match="values"):
        scaling.fit_exponent(values, measures)


def test_exponents_stand_in_the_picture():
    run = some_results("scaling")
    linear = tuple(
        dataclasses.replace(r, timing=dataclasses.replace(r.timing, median_ms=r.case.value**1.25))
        for r in run.records
    )
    assert "exponent 1.25" in words(Figures(dataclasses.replace(run, records=linear))[f"growth-{PAPER}-fp16"])


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"suite must be one of layer, train, .* got 'latency'"):
        plots.pictures(some_results(suite="layer", stages=(1,)).__class__("latency", 0, a_stamp()))


def test_a_picture_that_cannot_be_drawn_costs_the_others_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a font is missing")

    monkeypatch.setitem(plots.DRAWINGS["layer"], "speed", fail)
    saved = dict(plots.save_plots(some_results(stages=(1,), batches=(1, 8)), tmp_path))
    failed = {name for name, outcome in saved.items() if isinstance(outcome, Exception)}
    assert failed == {"layer-cuda-speed-classic-fp16", "layer-cuda-speed-paper-fp16"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in {*saved} - failed}


@pytest.mark.parametrize("all_forms", [False, True])
def test_a_sweep_is_drawn_where_an_axis_was_not_measured(all_forms):
    """As after Ctrl-C in the first case of the second axis."""
    run = some_results("sweep")
    records = tuple(
        dataclasses.replace(r, timing=None, status=results.NOT_MEASURED) if r.case.axis == "dilation" else r
        for r in run.records
    )
    (figure,) = Figures(dataclasses.replace(run, records=records), all_forms).values()
    assert "dilation" in words(figure)


def test_every_form_has_a_look():
    looks = {style.mode(key) for key in forms.BY_KEY}
    for table in (style.MODE_HATCHES, style.MODE_MARKERS, style.MODE_DASHES):
        assert looks <= {*table}
        assert len({*table.values()}) == len(table)
