"""Passes over memory, counted by the interpreter."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sk_triton import cli, dispatch, launching, planning
from sk_triton.bench.commands import traffic as traffic_command
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.bench.interpreted import traffic
from sk_triton.bench.interpreted.meter import Meter
from sk_triton.bench.shapes import CLASSIC
from sk_triton.chips import CHIPS
from sk_triton.workload import Workload

from .versions import HAS_NARROW_PRODUCTS, needs_narrow_products, needs_unhoisted_loops

pytestmark = pytest.mark.interpret


WINDOW = "branch_conv_window" if HAS_NARROW_PRODUCTS else "branch_conv_stream"
BRANCH_KERNELS = {1: WINDOW, 2: WINDOW, 3: WINDOW, 4: "branch_conv_held"}
# How often a window asks for x, for 18 taps: once a strip, and for what it shares with the strips beside it.
MOST_ASKED = {1: 1.7, 2: 1.8, 3: 2.2}
STAGES = [
    (1, 0.03),
    (2, 0.05),
    pytest.param(3, 0.2, marks=needs_narrow_products),
    pytest.param(4, 0.4, marks=needs_narrow_products),
]


@pytest.mark.parametrize(("stage", "small"), STAGES)
def test_store_schedule_moves_six_passes(stage, small):
    full, spec, n, size = traffic.STAGES[stage]
    rows, unit = traffic.count(spec, n, size, full)
    touched = {(row.kernel, row.tensor): row.touched / unit for row in rows}
    kernel = BRANCH_KERNELS[stage]
    assert touched[kernel, "x"] == 1
    assert_asks_once_a_strip(rows, unit, stage)
    assert touched[kernel, "u"] == touched["select", "u"] == 2
    assert touched["select", "v"] == 1
    assert traffic.passes(rows, unit) == 6
    # What else grows with the batch; it weighs more against fewer pixels.
    assert traffic.passes(rows, unit, ("partial", "attention")) <= small


@pytest.mark.parametrize(("stage", "small"), STAGES)
def test_recompute_schedule_moves_three_passes(stage, small):
    full, spec, n, size = traffic.STAGES[stage]
    rows, unit = traffic.count(spec, n, size, full, "recompute")
    touched = {(row.kernel.split(", ")[-1], row.tensor): row.touched / unit for row in rows}
    assert touched["pool", "x"] == touched["select", "x"] == touched["select", "v"] == 1
    assert traffic.passes(rows, unit) == 3
    assert traffic.passes(rows, unit, ("partial", "attention")) <= small
    assert_asks_once_a_strip(rows, unit, stage)


def assert_asks_once_a_strip(rows, unit, stage):
    for row in rows:
        if row.tensor == "x" and row.kernel.startswith("branch_conv_window"):
            assert row.read <= MOST_ASKED[stage] * unit, row.kernel


@needs_unhoisted_loops
@pytest.mark.parametrize(("stage", "small"), [(1, 0.03), (2, 0.06), (3, 0.2)])
def test_resident_schedule_moves_two_passes(stage, small):
    full, spec, n, size = traffic.STAGES[stage]
    rows, unit = traffic.count(spec, n, size, full, "resident")
    touched = {row.tensor: row.touched / unit for row in rows}
    assert {row.kernel for row in rows} == {"unit_resident"}
    assert touched["x"] == touched["v"] == 1
    assert traffic.passes(rows, unit) == 2
    assert traffic.passes(rows, unit, ("partial", "attention")) <= small


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (paper_unit(16, groups=1), 9),
        (paper_unit(16, groups=1, split_input=True), 10),
        (paper_unit(16, groups=1, kernels=(3, 3, 3), dilations=(1, 2, 3)), 13),
        (classic_unit(16, num_branches=1, groups=1), 5),
    ],
    ids=["dense", "split", "three branches", "one branch, linear"],
)
def test_library_schedule_moves_what_its_plan_says(spec, expected):
    """Each convolution reads x and writes a branch; pooling reads them all, selecting reads them again and writes v."""
    rows, unit = traffic.count(spec, 2, 14, schedule="library")
    m = spec.num_branches
    touched = {(row.kernel, row.tensor): row.touched / unit for row in rows if row.kernel != "library"}
    assert touched["pooled_sums", "u"] == touched["select", "u"] == m
    assert touched["select", "v"] == 1
    assert sum(row.touched for row in rows if (row.kernel, row.tensor) == ("library", "u")) == m * unit
    assert traffic.passes(rows, unit) == expected
    plan = planning.plan_schedule("library", Workload(spec, 2, 14, 14, torch.float16, CHIPS["sm_90"]))
    assert plan.passes == expected
    assert traffic.passes(rows, unit, ("partial", "attention")) <= 0.2


@needs_narrow_products
@pytest.mark.parametrize(("save", "total"), [("branches", 8 + 8), ("input", 4 + 3 + 8)])
def test_a_training_step(save, total):
    rows, unit = traffic.count_training(paper_unit(16, groups=4), 1, 7, save=save)
    assert traffic.passes(rows, unit) == total
    names = {row.kernel for row in rows}
    assert {"select_bwd", "branch_grad_stream", "branch_conv_window, train"} <= names
    assert ("branch_conv_window, measure" in names) == (save == "input")


def test_classic_unit():
    rows, unit = traffic.count(classic_unit(16, groups=4), 1, 14, classic_unit(128))
    assert traffic.passes(rows, unit) == 6


def test_an_access_outside_of_its_tensors_is_caught():
    from sk_triton.kernels.config import SelectConfig
    from sk_triton.kernels.select import select_fwd

    u, attention, v = torch.randn(2, 1, 2, 2, 16), torch.rand(1, 2, 16), torch.empty(1, 16, 2, 2)
    launch = select_fwd(u, attention, v, config=SelectConfig(4, 16))
    with Meter({"u": u, "attention": attention, "v": v}).watch() as rows:
        launch()
    assert {row.tensor: (row.read, row.written) for row in rows} == {
        "u": (u.numel() * 4, 0),
        "attention": (attention.numel() * 4, 0),
        "v": (0, v.numel() * 4),
    }
    with (
        pytest.raises(Exception, match="16 accesses outside of every tensor"),
        Meter({"u": u, "v": v}).watch(),
    ):
        launch()


@needs_narrow_products
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_merged_schedule_moves_three_passes_of_linear_branches(stage):
    full, spec, n, size = traffic.COUNTED[CLASSIC][stage]
    rows, unit = traffic.count(spec, n, size, full, "merged")
    convolution = "merged_conv" if stage == 3 else "merged_conv_window"
    assert {row.kernel for row in rows} == {"border_sums", "gate", convolution}
    assert traffic.passes(rows, unit) == 3
    assert (traffic.passes(rows, unit, ("x",)), traffic.passes(rows, unit, ("v",))) == (2, 1)
    assert traffic.passes(rows, unit, ("partial", "attention")) <= 0.1


@needs_narrow_products
def test_a_few_channels_are_merged_by_the_configs_of_all(monkeypatch):
    full, spec, n, size = traffic.COUNTED[CLASSIC][3]
    planned, small = (
        planning.plan_schedule("merged", Workload(each, 128, size, size, torch.float16, CHIPS["sm_90"]))
        for each in (full, spec)
    )
    assert planned.merged_launch.conv != small.merged_launch.conv
    seen = []
    prepare = launching.prepare
    monkeypatch.setattr(
        launching, "prepare", lambda plan, *rest: (seen.append(plan), prepare(plan, *rest))[1]
    )
    traffic.count(spec, n, size, full, "merged")
    (plan,) = seen
    assert plan.merged_launch.conv == planned.merged_launch.conv
    assert plan.merged_launch.border == planned.merged_launch.border


def test_the_command_counts_the_unit_that_it_is_given(capsys):
    assert cli.main(["traffic", "--stage", "4", "--unit", "classic", "--schedule", "store"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Schedule store, classic unit, stage 4" in out
    assert "activations 6.00 T" in out
    assert "counted on 1 sample of 64 of 1024 channels" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--schedule", "merged"],
            "schedule 'merged' cannot run the paper unit of stage 1: branch_act is relu; only linear branches",
        ),
        (
            ["--schedule", "merged", "--unit", "classic", "--stage", "4"],
            "stage 4: a group has 32 channels; above 16",
        ),
        pytest.param(
            ["--schedule", "resident", "--stage", "4"],
            "stage 4: no tiles serve to pool and to select in one launch for branches 3x3 g32, 3x3 d2 g32 of 32",
            marks=needs_unhoisted_loops,
        ),
        (["--save", "input"], "--save acts on --schedule train, got --schedule recompute"),
        (
            ["--save", "branches", "--schedule", "store"],
            "--save acts on --schedule train, got --schedule store",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(options, message, capsys):
    assert cli.main(["traffic", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sk-triton traffic: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (2, 2), (-9, 1)])
def test_where_kernels_are_compiled_the_command_counts_in_another_process(ended, code, monkeypatch):
    """This one may be a program that calls `main`: it goes on, with the options that it gave."""
    run = []

    def child(command, env, check):
        run.append((command[1:], env["TRITON_INTERPRET"]))
        return SimpleNamespace(returncode=ended)

    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    monkeypatch.setattr(traffic_command.subprocess, "run", child)
    monkeypatch.setattr(sys, "argv", ["another program", "its option"])
    assert cli.main(["traffic", "--stage", "2", "--schedule", "train", "--save", "input"]) == code
    options = ["--stage=2", "--schedule=train", "--unit=paper", "--save=input"]
    assert run == [(["-m", "sk_triton", "traffic", *options], "1")]
