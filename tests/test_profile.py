"""`sk-triton profile`: kernels timed one by one, and the tables that the README's are made of."""

import argparse
import io

import pytest
import torch
from rich.console import Console

from sk_triton.bench import unit_times
from sk_triton.bench.commands import profile
from sk_triton.bench.measuring import kernel_times
from sk_triton.bench.measuring.entrant import Entrant
from sk_triton.bench.measuring.kernel_times import CallTimes, Kernel, append, measure, medians
from sk_triton.bench.shapes import CLASSIC, INFERENCE, PAPER, TRAINING
from sk_triton.cli import main


def call(*kernels, start=0.0, gap=1.0):
    """Kernels (name, duration), one after the other."""
    found = []
    for name, duration in kernels:
        found.append(Kernel(name, start, start + duration))
        start += duration + gap
    return found


def asked(*arguments):
    parser = argparse.ArgumentParser()
    profile.add_arguments(parser)
    return parser.parse_args(arguments)


def small_case(direction):
    options = ("--stage", "4", "--unit", "paper", "--batch", "2", "--dtype", "fp32", "--direction", "both")
    return next(case for case in profile.cases(asked(*options)) if case.direction == direction)


def test_a_kernel_takes_the_median_of_its_durations():
    times = medians([call(("a", 10), ("b", d)) for d in (5, 1, 30)])
    assert times.kernels == (("a", 10), ("b", 5))
    assert times.total == 15
    assert times.span == 16


def test_kernels_are_in_the_order_in_which_they_began():
    first, second = call(("a", 10), ("b", 5))
    assert medians([[second, first]]).kernels == (("a", 10), ("b", 5))


def test_a_kernel_that_is_called_twice_is_two():
    assert medians([call(("a", 10), ("a", 2))]).kernels == (("a", 10), ("a", 2))


def test_calls_that_ran_something_else_do_not_count():
    usual = call(("a", 10), ("b", 5))
    times = medians([usual, call(("compiled", 900), ("a", 10), ("b", 5)), usual, []])
    assert times.kernels == (("a", 10), ("b", 5))
    assert times.span == 16


def test_kernels_that_overlap_end_with_the_last_one():
    assert medians([[Kernel("a", 0, 100), Kernel("b", 10, 20)]]).span == 100


@pytest.mark.parametrize("calls", [[], [[], []]])
def test_without_kernels_there_is_nothing_to_tell(calls):
    with pytest.raises(ValueError, match="calls must run kernels on a GPU, none did"):
        medians(calls)


def test_the_tables_are_what_the_readme_reads(tmp_path):
    folder = tmp_path / "h100"
    inference, training = profile.cases(asked("--stage", "2", "--unit", "paper", "--direction", "both"))
    append(folder, "0123456789", inference, "recompute", CallTimes((("pool", 40.0), ("select", 60.0)), 104.0))
    append(folder, "0123456789", training, "train, branches saved", CallTimes((("step", 900.0),), 900.0))
    found = {time.case: time for time in unit_times.load(folder / unit_times.NAME)}
    assert found.keys() == {inference, training}
    assert found[inference].schedule == "recompute"
    assert found[inference].seconds == pytest.approx(100e-6)
    assert found[training].seconds == pytest.approx(900e-6)
    launches = (folder / "launches.csv").read_text().splitlines()
    assert launches[1:] == [
        "0123456789,paper,256@28x28,128,fp16,inference,recompute,0,pool,40.0",
        "0123456789,paper,256@28x28,128,fp16,inference,recompute,1,select,60.0",
        '0123456789,paper,256@28x28,128,fp16,training,"train, branches saved",0,step,900.0',
    ]


def test_a_table_goes_on_where_it_was(tmp_path):
    (case,) = profile.cases(asked("--stage", "1", "--unit", "classic"))
    for total in (200.0, 100.0):
        append(tmp_path / "h100", "0", case, "merged", CallTimes((("k", total),), total))
    (time,) = unit_times.load(tmp_path / "h100" / unit_times.NAME)
    assert time.seconds == pytest.approx(100e-6), "the newest"


def test_all_stages_of_both_units_by_default():
    found = profile.cases(asked())
    assert [(case.subject, case.shape.channels) for case in found] == [
        (subject, channels) for channels in (128, 256, 512, 1024) for subject in (PAPER, CLASSIC)
    ]
    assert {(case.direction, case.batch, case.dtype) for case in found} == {(INFERENCE, 128, "fp16")}
    assert {case.direction for case in profile.cases(asked("--direction", "backward"))} == {TRAINING}


def test_a_cpu_has_no_kernels_to_time(capsys):
    assert main(["profile", "--device", "cpu"]) == 2
    assert "--device must be a GPU, whose kernels can be timed, got 'cpu'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(profile, "choose_device", lambda name: torch.device("cuda", 0))
    assert main(["profile", "--output", "/dev/null/folder"]) == 2
    assert "--output must be a folder that can be written to" in capsys.readouterr().err


def test_a_call_and_its_kernels_are_printed():
    (case,) = profile.cases(asked("--stage", "1", "--unit", "paper"))
    console = Console(file=io.StringIO(), width=200)
    profile.show(case, "recompute", CallTimes((("pool", 40.5), ("select", 60.0)), 104.0), console)
    printed = console.file.getvalue()
    assert "recompute: 100.5 µs in 2 kernels, 104.0 µs from the first to the last" in printed
    assert [line.split() for line in printed.splitlines()[1:]] == [["40.50", "pool"], ["60.00", "select"]]


@pytest.mark.parametrize(
    ("schedule", "direction", "name"),
    [
        ("eager", TRAINING, "eager"),
        ("auto", INFERENCE, "recompute"),
        ("auto", TRAINING, "train, branches saved"),
    ],
)
def test_what_is_profiled_is_the_call_of_the_benchmarks(schedule, direction, name, monkeypatch):
    case = small_case(direction)
    results = []

    def profiled(call, device):
        results.append(call())
        return [[Kernel("k", 0, 2)]]

    monkeypatch.setattr(kernel_times, "_profiled", profiled)
    runs = "triton/train" if direction == TRAINING else "triton/recompute"
    monkeypatch.setattr(Entrant, "runs", lambda entrant, x: runs)
    found, times = measure(case, schedule, torch.device("cpu"))
    assert (found, times.total) == (name, 2)
    assert results[0].shape == (2, 1024, 7, 7)


@pytest.mark.parametrize("direction", [INFERENCE, TRAINING])
def test_what_does_not_run_on_the_kernels_is_not_taken_for_them(direction):
    case = small_case(direction)
    with pytest.raises(
        ValueError, match=r"must run on sk_triton's kernels, it runs on (torch/folded|reference/eager)"
    ):
        measure(case, "auto", torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, capsys):
    arguments = ["--stage", "3", "--unit", "paper", "--batch", "2", "--direction", "both"]
    assert (
        main(["profile", *arguments, "--schedule", "auto", "eager", "--output", str(tmp_path / "h100")]) == 0
    )
    assert "µs in" in capsys.readouterr().out
    times = unit_times.load(tmp_path / "h100" / unit_times.NAME)
    assert {time.schedule for time in times} >= {"eager", "train, branches saved"}
    assert all(0 < time.seconds < 0.1 for time in times)
