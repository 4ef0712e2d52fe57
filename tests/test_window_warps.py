"""Window kernels of several warps a program: what they compute, as the compiler makes them, when they are chosen."""

from dataclasses import replace

import pytest
import torch

from sk_triton import chips, planning
from sk_triton.analytic import window as analytic_window
from sk_triton.analytic.branch import branch_config
from sk_triton.bench.compiled.planned import unit_parameters
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.chips import chip_of
from sk_triton.kernels.config import WindowConfig
from sk_triton.kernels.geometry import ConvShape
from sk_triton.launching import run_packed
from sk_triton.pack_cache import PackCache
from sk_triton.packing import pack
from sk_triton.workload import Workload

from .compiling import rows_of
from .versions import needs_narrow_products

pytestmark = needs_narrow_products
CHIPS = ("sm_90", "sm_100")


def in_warps(plan, num_warps):
    """The plan with as many warps in each window program, of which it has some."""
    met = []

    def changed(config):
        if not isinstance(config, WindowConfig):
            return config
        met.append(config)
        return replace(config, num_warps=num_warps)

    launches = tuple(replace(launch, config=changed(launch.config)) for launch in plan.branch_launches)
    merged = plan.merged_launch and replace(plan.merged_launch, conv=changed(plan.merged_launch.conv))
    assert met
    return replace(plan, branch_launches=launches, merged_launch=merged)


def outputs(spec, schedule, n, size, device, dtype, warps):
    """A unit's output with each number of warps."""
    branches, gate = unit_parameters(
        spec, lambda *shape: 0.3 * torch.randn(shape, device=device, dtype=dtype)
    )
    x = torch.randn(n, spec.in_channels, size, size, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    plan = planning.plan_schedule(schedule, Workload(spec, n, size, size, dtype, chip_of(x.device), False))
    found = []
    for num_warps in warps:
        own = in_warps(plan, num_warps) if num_warps > 1 else plan
        with torch.no_grad():
            found.append(run_packed(own, x, pack(own, size, size, branches, gate, None), spec)[0])
    return found


@pytest.mark.interpret
@pytest.mark.parametrize(("unit", "schedule"), [(paper_unit, "recompute"), (classic_unit, "merged")])
def test_weights_are_packed_anew_where_blocks_fill_up_programs(unit, schedule):
    """Three channel blocks: a program of four warps reads the weights of a fourth."""
    spec = unit(48, groups=12)
    branches, gate = unit_parameters(spec, lambda *shape: 0.3 * torch.randn(shape).half())
    x = torch.randn(2, 48, 6, 6).half().to(memory_format=torch.channels_last)
    plan = planning.plan_schedule(schedule, Workload(spec, 2, 6, 6, x.dtype, chip_of(x.device), False))
    cache, found = PackCache(), []
    for own in (plan, in_warps(plan, 4), plan):
        with torch.no_grad():
            found.append(run_packed(own, x, pack(own, 6, 6, branches, gate, cache), spec)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


UNITS = pytest.mark.parametrize(
    ("unit", "schedule"),
    [(paper_unit, "recompute"), (paper_unit, "store"), (classic_unit, "merged")],
    ids=["recompute", "store", "merged"],
)


@UNITS
@pytest.mark.interpret
def test_the_same_bits_interpreted(unit, schedule):
    one, two, four = outputs(unit(64, groups=16), schedule, 2, 6, "cpu", torch.float16, (1, 2, 4))
    assert torch.equal(two, one)
    assert torch.equal(four, one)


@UNITS
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "size"), [(128, 56), (256, 28), (512, 14)])
def test_the_same_bits_on_a_gpu(unit, schedule, channels, size, dtype):
    one, two, four = outputs(unit(channels), schedule, 128, size, "cuda", dtype, (1, 2, 4))
    assert torch.equal(two, one)
    assert torch.equal(four, one)


@pytest.fixture(scope="module")
def compiled():
    rows = rows_of("window_resources.py", *CHIPS)
    assert {row["chip"] for row in rows} == set(CHIPS)
    assert {row["task"] for row in rows} == {"pool", "select", "store", "train", "measure", "merged"}
    assert {row["blocks"] for row in rows} == {4}
    return rows


@pytest.mark.compile
def test_no_kernel_spills(compiled):
    """But for selecting at 128@56² on sm_100, once a row."""
    spilling = {(row["chip"], row["unit"], row["task"]) for row in compiled if row["spills"]}
    assert spilling <= {("sm_100", "stage 1", "select")}
    assert max(row["spills"] for row in compiled) <= 56 + 4


@pytest.mark.compile
def test_lines_are_written_whole(compiled):
    """Sixteen bytes a thread, eight threads a line; a row's last, odd pixel eight. Pooled sums and moments are few."""
    for row in compiled:
        if row["task"] in ("pool", "measure"):
            assert row["barriers"] < 12, row
        else:
            assert row["wide_stores"] >= 0.6 * row["stores"], row


@pytest.mark.compile
def test_rows_are_fetched_ahead(compiled):
    assert all(row["prefetches"] for row in compiled)


def chosen(task, channels=128, groups=32, n=128, chip="sm_90", dtype=torch.float16):
    """The warps of the analytic choice for outputs of 28 x 28 pixels, and whether it fetches ahead."""
    shape = ConvShape(channels, channels, groups, (3, 3), (1, 2))
    config = branch_config(shape, n, 28, 28, dtype, True, chips.CHIPS[chip], task=task)
    assert isinstance(config, WindowConfig)
    return config.num_warps, config.PREFETCH


@pytest.mark.parametrize(("task", "warps"), [("pool", 2), ("select", 2), ("train", 4), ("store", 4)])
def test_how_many_are_chosen(task, warps):
    assert chosen(task) == (warps, True)
    assert chosen(task, chip="sm_80") == (1, False)  # where nothing is fetched ahead
    alone = (1, task != "train")
    assert chosen(task, chip="sm_100") == alone  # not measured
    assert chosen(task, n=1) == alone  # programs for each processor there are not
    assert chosen(task, channels=160, groups=40, n=512) == (2, True)  # ten channel blocks
    assert chosen(task, channels=112, groups=28) == alone  # seven
    assert chosen(task, channels=384) == alone  # blocks of 12 channels


def test_short_runs_select_one_warp_a_program():
    """In bf16 runs of seven pixels do not fit."""
    assert chosen("select", dtype=torch.bfloat16) == (1, True)


@pytest.mark.parametrize(("version", "is_fetched"), [((3, 8), True), ((3, 9), False)])
def test_moments_do_not_spill_by_prefetch(version, is_fetched, monkeypatch):
    monkeypatch.setattr(analytic_window, "triton_version", lambda: version)
    shape = ConvShape(512, 512, 32, (3, 3), (1, 2))
    branch_config.cache_clear()
    config = branch_config(shape, 128, 14, 14, torch.bfloat16, True, chips.CHIPS["sm_90"], task="train")
    branch_config.cache_clear()
    assert config.BLOCK_N > 2
    assert (config.num_warps, config.PREFETCH) == (4, is_fetched)


def test_images_of_64_bit_offsets_take_one_warp():
    shape = ConvShape(128, 128, 32, (3, 3), (1, 2))
    config = branch_config(shape, 1, 4480, 4480, torch.float16, True, chips.CHIPS["sm_90"], task="store")
    assert (config.num_warps, config.HOLD_WEIGHTS) == (1, False)
