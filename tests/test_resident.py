"""Whole units through schedule "resident", interpreted as one program, and when it is taken."""

import dataclasses
import math
import random
import re

import pytest
import torch

from sk_triton import SelectiveKernel, planning, preference, use_backend
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.chips import CHIPS
from sk_triton.layout import empty_output
from sk_triton.workload import Workload

from .compiling import rows_of
from .versions import IS_CONFIGURED_FOR, needs_unhoisted_loops
from .whole_units import LAYERS, VIEWS, compare, image

pytestmark = needs_unhoisted_loops

NAMES = (
    "classic",
    "classic, one branch",
    "three branches",
    "paper",
    "paper, stride 2",
    "split, groups",
    "dilation 2",
    "16 channels per group",
    "odd channels",
    "depthwise",
)


@pytest.mark.interpret
@pytest.mark.parametrize("name", NAMES)
def test_layers(name, memory_format):
    layer = LAYERS[name]().half()
    x = torch.randn(2, layer.spec.in_channels, 7, 5).half().contiguous(memory_format=memory_format)
    compare(layer, x, "resident")


@pytest.mark.interpret
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 9, 3), (3, 2, 11)], ids=str)
def test_sizes(size):
    n, h, w = size
    compare(LAYERS["paper"]().half(), torch.randn(n, 16, h, w).half(), "resident")


@pytest.mark.interpret
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(view):
    compare(LAYERS["paper"]().half(), view(torch.randn(2, 16, 6, 5).half()), "resident")


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["paper, stride 2", "16 channels per group"])
def test_every_output_element_is_written(name, nan_in_new_memory):
    layer = LAYERS[name]().half()
    compare(layer, image(layer, 2, 7, 5), "resident")


@pytest.mark.interpret
def test_a_bad_value_stays_in_its_sample():
    layer, x = LAYERS["paper"]().eval().half(), torch.randn(3, 16, 7, 5).half()
    x[1, 2, 3, 4] = math.nan
    with torch.no_grad(), use_backend("triton", schedule="resident"):
        bad = layer(x).isnan().flatten(1).any(1)
    assert bad.tolist() == [False, True, False]


def prepared(n=3, size=5, *, lags=None):
    """(the unit's launch on the CPU, its input, its output, what the reference gives)."""
    from sk_triton import launching
    from sk_triton.packing import pack

    layer = SelectiveKernel(16, groups=4, split_input=False).eval().half()
    x = torch.randn(n, 16, size, size).half().to(memory_format=torch.channels_last)
    plan = planning.plan_schedule("resident", Workload(layer.spec, n, size, size, x.dtype, CHIPS["sm_90"]))
    if lags is not None:
        config = dataclasses.replace(plan.resident, GATE_LAG=lags[0], SELECT_LAG=lags[1])
        plan = dataclasses.replace(plan, resident=config)
    v = empty_output(x, layer.spec)
    with torch.no_grad():
        packed = pack(plan, size, size, layer.branches(), layer.gate(), None)
        (launch,) = launching.prepare(plan, x, v, packed, layer.spec)
        with use_backend("reference"):
            return launch, x, v, layer(x)


def argument(launch, name):
    return launch.arguments[launch.kernel.arg_names.index(name)]


@pytest.mark.interpret
def test_a_launch_leaves_its_counters_ready_for_the_next():
    launch, _, v, expected = prepared()
    state = argument(launch, "state_ptr")
    for count in (1, 2, 3):
        v.fill_(math.nan)
        launch()
        torch.testing.assert_close(v, expected, rtol=2e-2, atol=2e-3)
        assert state.tolist() == [count, *[0] * (state.numel() - 1)]


@pytest.mark.interpret
@pytest.mark.parametrize("lags", [(0, 0), (1, 1), (1, 2), (3, 3), (2, 7)], ids=str)
def test_any_lag_gives_the_result(lags):
    launch, _, v, expected = prepared(lags=lags)
    launch()
    torch.testing.assert_close(v, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.interpret
@pytest.mark.parametrize("programs", [2, 3, 7])
def test_several_programs_share_the_items(programs):
    """Phase by phase, since the interpreter runs programs one after another and none may wait."""
    launch, _, v, expected = prepared(lags=(1, 2))
    launch()
    whole = v.clone()
    v.fill_(math.nan)
    state, attention = argument(launch, "state_ptr"), argument(launch, "attention_ptr")
    argument(launch, "partial_ptr").fill_(math.nan)
    attention.zero_()
    for phase in ("pool", "gate", "select"):
        state.zero_()  # all three count as one launch
        launch._replace(grid=(programs,), constexprs={**launch.constexprs, "PHASE": phase})()
    assert torch.equal(v, whole)
    torch.testing.assert_close(v, expected, rtol=2e-2, atol=2e-3)


def test_a_lag_that_selects_before_the_gate_is_refused():
    with pytest.raises(ValueError, match="selected after its gate, got GATE_LAG 2 and SELECT_LAG 1"):
        prepared(lags=(2, 1))


def walk(n, pool, gate, select, gate_lag, select_lag, per_turn, programs, rng):
    """Runs a model of the kernel's list in random order of programs; returns whether all of it came to an end."""
    step_items = pool + gate + select
    total = (n + select_lag) * step_items
    turns = -(-total // (programs * per_turn)) * per_turn
    pooled, gated = [0] * n, [0] * n

    def program(index):
        for turn in range(turns):
            item = (turn // per_turn * programs + index) * per_turn + turn % per_turn
            step, place = divmod(item, step_items)
            if place < pool:
                if step < n:
                    yield
                    pooled[step] += 1
            elif place < pool + gate:
                if 0 <= step - gate_lag < n:
                    while pooled[step - gate_lag] < pool:
                        yield
                    gated[step - gate_lag] += 1
            elif 0 <= step - select_lag < n:
                while gated[step - select_lag] < gate:
                    yield

    running = [program(i) for i in range(programs)]
    for _ in range(200 * (total + programs)):
        if not running:
            return pooled == [pool] * n and gated == [gate] * n
        current = rng.choice(running)
        if next(current, "ended") == "ended":
            running.remove(current)
    return False


def test_the_list_advances_in_any_order_of_programs():
    rng = random.Random(0)
    for _ in range(300):
        gate_lag = rng.randint(0, 4)
        sizes = [rng.randint(1, 5) for _ in range(4)]
        assert walk(
            *sizes, gate_lag, gate_lag + rng.randint(0, 4), rng.randint(1, 3), rng.randint(1, 12), rng
        )
    # What the launcher refuses would wait for itself.
    assert not walk(2, 2, 1, 2, 3, 0, 1, 1, rng)


def plan(spec, *, n=128, size=56, dtype=torch.float16, chip="sm_90"):
    return preference.fastest_plan(Workload(spec, n, size, size, dtype, CHIPS[chip]))


@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28), (512, 14)])
@pytest.mark.parametrize("n", [1, 128])
def test_unmeasured_it_is_left_alone_and_runs_on_request(channels, size, n):
    work = Workload(paper_unit(channels), n, size, size, torch.float16, CHIPS["sm_90"])
    chosen = preference.fastest_plan(work)
    assert chosen.schedule == ("gated" if n == 1 else "recompute")
    assert (
        "2 passes over memory in one launch, but slower where it was measured"
        in dict(chosen.rejected)["resident"]
    )
    assert planning.plan_schedule("resident", work).passes == 2


def test_elsewhere_the_plan_says_why_not():
    large = plan(paper_unit(256), n=8, size=224)
    assert large.schedule == "recompute"
    assert "of L2; at most 50% hold" in dict(large.rejected)["resident"]
    assert "have an L2 each" in dict(plan(paper_unit(128), chip="gfx942").rejected)["resident"]
    assert "of sm_86's 6 MiB" in dict(plan(paper_unit(128), chip="sm_86").rejected)["resident"]
    assert "short columns only" in dict(plan(paper_unit(128), chip="sm_80").rejected)["resident"]
    assert "merged convolves once" in dict(plan(classic_unit(128)).rejected)["resident"]
    for spec, size, dtype, reason in (
        (
            paper_unit(1024),
            7,
            torch.float16,
            "of 32 channels per group .* at most 3x3 in groups of 16 channels",
        ),
        (paper_unit(4096, groups=256), 7, torch.float16, "gate_width is 256; .* up to 128"),
        (paper_unit(128), 56, torch.float32, "fp32 convolves"),
        (paper_unit(64, groups=32, dilations=(1, 3)), 56, torch.float16, "3x3 d3 g32 .* no power of two"),
    ):
        with pytest.raises(RuntimeError, match=f"schedule 'resident' cannot run here: .*{reason}"):
            planning.plan_schedule("resident", Workload(spec, 128, size, size, dtype, CHIPS["sm_90"]))


@pytest.mark.parametrize(("dilations", "chip", "is_unrolled"), [
    ((1, 2), "sm_90", True), ((1, 2), "sm_100", False), ((1, 2, 4), "sm_90", False),
])  # fmt: skip
def test_loops_are_unrolled_where_registers_allow_it(dilations, chip, is_unrolled):
    """21 spills with three branches, 2 on sm_100."""
    spec = paper_unit(512, kernels=(3,) * len(dilations), dilations=dilations)
    workload = Workload(spec, 128, 14, 14, torch.float16, CHIPS[chip])
    branch = planning.plan_schedule("resident", workload).resident.branch
    assert branch.RUN_H == 14
    assert branch.UNROLL is is_unrolled


@pytest.mark.parametrize("n", [1, 2, 16, 128, 1000])
def test_programs_fit_on_the_processors(n):
    for chip in CHIPS.values():
        for channels, size in ((128, 56), (256, 28), (512, 14)):
            workload = Workload(paper_unit(channels), n, size, size, torch.float16, chip)
            if planning.refusal("resident", workload):
                continue
            config = planning.plan_schedule("resident", workload).resident
            # 65536 registers, handed out eight to a thread of a warp.
            assert config.programs_per_processor * config.branch.num_warps * 32 * 256 <= 65536
            assert 0 <= config.GATE_LAG <= config.SELECT_LAG


@pytest.fixture(scope="module")
def compiled():
    """The kernel on each chip that runs it."""
    chips = ("sm_90", "sm_100", *(("sm_80", "sm_89", "sm_120") if IS_CONFIGURED_FOR else ()))
    rows = rows_of("resident_machine_code.py", *chips)
    assert {row["chip"] for row in rows} == set(chips)
    return rows


@pytest.mark.compile
def test_the_kernel_is_cooperative_and_does_not_spill(compiled):
    for row in compiled:
        assert row["is_cooperative"]
        assert row["spills"] == 0, (row["chip"], row["channels"])
        # Eight programs of the most registers that there are share 99 KiB at least.
        assert row["registers"] <= 255
        assert 8 * (row["shared"] + 1024) <= 99 * 1024
        assert row["matrix"] > 0


@pytest.mark.compile
def test_memory_order_of_the_machine_code(compiled):
    """A barrier, then one thread's release, where a tile is pooled; an acquire, then a barrier, where a gate waits."""
    for row in compiled:
        lines = [
            line.strip()
            for line in row["ptx"].splitlines()
            if re.search(r"\b(bar\.sync|barrier\.sync|atom|red|ld\.global\.\S*acquire|ld\.volatile)", line)
        ]
        release = [i for i, line in enumerate(lines) if ".release." in line or ".acq_rel." in line]
        acquire = [i for i, line in enumerate(lines) if ".acquire." in line]
        assert len(release) == 2, lines  # a pooled tile, and a program that has finished
        assert len(acquire) == 1, lines
        assert all(".gpu." in lines[i] for i in (*release, *acquire))
        assert "bar" in lines[release[0] - 1]
        assert "bar" in lines[acquire[0] + 1]
        words = [line for line in lines if "exch.b64" in line]
        assert words
        assert all(".gpu.relaxed." in line for line in words)
        assert any(re.search(r"ld\.volatile\.global.*b64", line) for line in lines)
        # No sum depends on the order of programs.
        assert not re.search(r"(atom|red)\S*\.f(16|32|64)", row["ptx"])
