"""Predicted times: bounds by hand, and physics that must hold."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from sk_triton.bench.compiled.instructions import matrix_flop
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.bench.model import l2, work
from sk_triton.bench.model import speed_of_light as sol
from sk_triton.bench.model.gpus import GPUS, Gpu, find_gpu
from sk_triton.bench.model.speed_of_light import ISSUE, L2, MATRIX, MEMORY, SHARED, Problem
from sk_triton.chips import CHIPS
from sk_triton.kernels.launch import Launch

from .fake_code import resources
from .versions import needs_narrow_products

H100 = find_gpu("h100")
# Round figures: a second of each is easy to count.
TOY = Gpu(
    name="toy",
    chip="sm_90",
    processors=10,
    clock_hz=1e9,
    memory_bytes_per_s=1e12,
    l2_bytes=1 << 20,
    l2_bytes_per_s=4e11,
    matrix_flop_per_s={"fp16": 1e14, "bf16": 1e14, "tf32": 5e13},
    sources={},
    warp_matrix_share=0.5,
    l2_port_bytes_per_clock=100,
    launch_seconds=1e-6,
)


def launch(*tensors: torch.Tensor, programs: int = 20, name: str = "probe_fwd_kernel") -> Launch:
    return Launch(SimpleNamespace(fn=SimpleNamespace(__name__=name)), (programs,), tensors, {}, {})


def meta(size: int) -> torch.Tensor:
    """A tensor of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8, device="meta")


def step_of(code: dict[str, int], programs: int = 20, memory: float = 0.0, **changes) -> sol.Step:
    used = dataclasses.replace(resources(code), **changes)
    asked = work.launch_work(launch(programs=programs), used, TOY, memory)
    return sol.times(asked, TOY)


# 20 programs of 2 warps on 10 processors: 40 warps, 4 on each processor.
@pytest.mark.parametrize(
    ("bound", "instructions", "memory", "seconds"),
    [
        (MEMORY, {}, 5e9, 5e9 / 1e12),
        (L2, {"LDG.E.128": 10**6, "STG.E.64": 10**6}, 0.0, 20 * 64 * (16 + 8) * 10**6 / 4e11),
        (MATRIX, {"HMMA.16816.F32": 10**6}, 0.0, 40 * 4096 * 10**6 / (0.5 * 1e14)),
        (MATRIX, {"HGMMA.64x128x16.F32.BF16": 10**6}, 0.0, 10 * 2 * 64 * 128 * 16 * 10**6 / 1e14),
        (SHARED, {"STS.128": 10**6, "LDSM.16.M88.4": 10**6, "LDS.U16": 10**6}, 0.0, 4 * (4 + 4 + 1) * 1e6 / 1e9),
        (ISSUE, {"IMAD.WIDE": 7 * 10**6, "NOP": 10**6}, 0.0, 4 * 8e6 / (4 * 1e9)),
    ],
)  # fmt: skip
def test_each_bound_by_hand(bound, instructions, memory, seconds):
    step = step_of(instructions, memory=memory)
    assert step.seconds[bound] == pytest.approx(seconds)
    assert step.bound == bound
    assert step.total == pytest.approx(seconds + 1e-6)


def test_looking_lines_up_may_take_longer_than_their_bytes():
    lookups = dataclasses.replace(TOY, l2_requests_per_s=1e9)
    used = resources({"LDG.E.64": 10**6})
    asked = work.launch_work(launch(), used, lookups, 0.0)
    lines = 20 * 64 * 8 * 10**6 / 128
    assert asked.l2_requests == lines
    assert sol.times(asked, lookups).seconds[L2] == pytest.approx(lines / 1e9)
    assert sol.times(asked, TOY).seconds[L2] == pytest.approx(lines * 128 / 4e11)


def test_the_processor_with_the_most_programs_decides():
    """21 programs on 10 processors take as long as 30."""
    full, one_more = step_of({"IMAD": 1000}, programs=30), step_of({"IMAD": 1000}, programs=21)
    assert one_more.seconds[ISSUE] == pytest.approx(full.seconds[ISSUE])
    assert step_of({"IMAD": 1000}, programs=20).seconds[ISSUE] == pytest.approx(full.seconds[ISSUE] * 2 / 3)


def test_few_programs_cannot_draw_all_of_l2():
    """One processor's port moves 100 bytes per clock, 1e11 per second: a quarter of the cache's bandwidth."""
    step = step_of({"LDG.E.128": 1000}, programs=1)
    assert step.seconds[L2] == pytest.approx(64 * 16 * 1000 / 1e11)


def test_code_without_counted_loops_is_marked():
    assert step_of({"IMAD": 1}).work.is_counted
    assert not step_of({"IMAD": 1}, instructions=None).work.is_counted


def test_a_product_of_unknown_shape_has_no_tensor_time():
    assert step_of({"UTCHMMA": 1}).seconds[MATRIX] is None


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("HMMA.16816.F32", ("fp16", 4096, True)),
        ("HMMA.1688.F32.TF32", ("tf32", 2048, True)),
        ("HMMA.16816.F32.BF16", ("bf16", 4096, True)),
        ("HGMMA.64x64x8.F32.TF32", ("tf32", 2 * 64 * 64 * 8 / 4, False)),
        ("v_mfma_f32_16x16x16_f16", ("fp16", 8192, False)),
        ("v_mfma_f32_32x32x8_bf16_1k", ("bf16", 16384, False)),
        ("UTCHMMA", None),
        ("HFMA2.MMA", None),
    ],
)
def test_flop_of_tensor_core_instructions(instruction, expected):
    assert matrix_flop(instruction) == expected


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({"threads": 32, "registers": 191}, 10),
        ({"threads": 128, "registers": 32}, 16),
        ({"threads": 32, "registers": 16}, 32),
        ({"threads": 128, "registers": 32, "shared": 75 * 1024}, 3),
    ],
)
def test_programs_that_a_processor_holds(changes, programs):
    """Limited by registers, threads, programs and shared memory, with a KiB of it for each program's own use."""
    assert work.resident_programs(resources({}, **changes), H100) == programs


def test_a_program_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"262144 bytes of shared memory does not fit .* H100 SXM"):
        work.resident_programs(resources({}, shared=262144), H100)


def test_memory_counts_each_tensor_once_and_what_l2_holds_not_again():
    x, u, v = meta(1000), meta(2000), meta(1000)
    steps = [launch(x, u, u), launch(u, v)]
    assert work.memory_bytes(steps, l2_size=10**6) == [3000, 1000]
    # x, u and v were touched since u was: 4000 bytes, and half of L2 may hold them.
    assert work.memory_bytes(steps, l2_size=8000) == [3000, 1000]
    assert work.memory_bytes(steps, l2_size=7999) == [3000, 3000]


def test_memory_forgets_what_a_large_launch_has_displaced():
    u, large = meta(1000), meta(10**6)
    steps = [launch(u), launch(large), launch(u)]
    assert work.memory_bytes(steps, l2_size=100_000) == [1000, 10**6, 1000]


def test_operators_between_kernels_count_their_bytes():
    step = functools.partial(torch.sum, meta(4000), 0, out=meta(8))
    assert work.memory_bytes([step], 0) == [4008]
    assert work.step_name(step) == "sum"
    with pytest.raises(TypeError, match=r"functools\.partial"):
        work.memory_bytes([lambda: None], 0)


# Runs of the last one are 3 pixels apart, which divides no tile: a tile's outputs are not adjacent.
@pytest.mark.parametrize(
    "spec",
    [
        paper_unit(128),
        paper_unit(256, stride=2),
        classic_unit(128),
        paper_unit(64, groups=64),
        paper_unit(1024, dilations=(2, 3)),
    ],
)
def test_tiles_read_what_their_outputs_need(spec):
    """Against every program's pixels, collected one by one."""
    n, height, width = 3, 17, 19
    problem = Problem(spec, n, height, width, torch.float16)
    _, plan, steps = sol.schedules_for(problem, CHIPS["sm_90"])[0]
    conv, shape, config = steps[0], plan.branch_launches[0].shape, plan.branch_launches[0].config
    options = conv.constexprs
    out_h, out_w = spec.output_size(height, width)
    tiles: dict[tuple[int, int], set] = {}
    same = options.get("SPACINGS", (1,) * len(shape.kernels))
    spacings = zip(options.get("SPACINGS_H", same), options.get("SPACINGS_W", same), strict=True)
    for (down, right), k, d in zip(spacings, shape.kernels, shape.dilations, strict=True):
        for y in range(out_h):
            for x in range(out_w):
                tile = []
                for at, run, block, spacing in (
                    (y, getattr(config, "RUN_H", 1), config.BLOCK_H, down),
                    (x, getattr(config, "RUN_W", 1), config.BLOCK_W, right),
                ):
                    # The run q with q // SPACING * RUN * SPACING + q % SPACING + r * SPACING == at.
                    (found,) = {
                        q
                        for q in range(2 * at + 2 * spacing)
                        for r in range(run)
                        if q // spacing * run * spacing + q % spacing + r * spacing == at
                    }
                    tile.append(found // block)
                pixels = tiles.setdefault(tuple(tile), set())
                for i in range(k):
                    for j in range(k):
                        row, column = y * spec.stride + (i - k // 2) * d, x * spec.stride + (j - k // 2) * d
                        if 0 <= row < height and 0 <= column < width:
                            pixels.add((row, column))
    named = dict(zip(conv.kernel.arg_names, conv.arguments, strict=False))
    programs = named["CHANNEL_PROGRAMS"]
    channel_bytes = 2 * options.get("CHANNELS_CI", 32) * options.get("BLOCKS_PER_PROGRAM", 1)
    read = n * sum(map(len, tiles.values())) * programs * max(channel_bytes, 32)
    u = named["out_ptr" if "out_ptr" in named else "u_ptr"]
    once = sum(t.numel() * t.element_size() for t in (named["shift_ptr"], u, named["partial_ptr"]))
    weights = named["w_ptr"].numel() * 2 * conv.grid[0] / programs
    assert l2.tile_bytes(conv) == read + weights + once


def test_copies_that_bypass_l1_count_in_full():
    _, _, steps = sol.schedules_for(Problem(paper_unit(128), 8, 28, 28, torch.float16), CHIPS["sm_90"])[0]
    asked = 10**6 * 16 * 64 * steps[0].grid[0]
    assert l2.l2_bytes(steps[0], resources({"LDGSTS.E.BYPASS.128": 10**6})) == asked
    assert l2.l2_bytes(steps[0], resources({"LDG.E.128": 10**6})) == l2.tile_bytes(steps[0]) < asked


CASES = [
    (spec, size)
    for spec in (paper_unit(128), classic_unit(256), paper_unit(256, kernels=(3,), dilations=(1,)))
    for size in (7, 56)
]


@pytest.mark.usefixtures("fake_code")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("spec", "size"), CASES)
def test_no_schedule_is_faster_than_the_floor_and_larger_batches_take_longer(spec, size, gpu):
    before: dict[str, float] = {}
    for n in (1, 8, 64, 256):
        predictions = sol.predict(Problem(spec, n, size, size, torch.float16), gpu)
        assert {p.schedule for p in predictions} >= {"store", sol.EAGER, sol.COMPILED, sol.FLOOR}
        floor = predictions[-1]
        assert floor.schedule == sol.FLOOR
        for prediction in predictions:
            assert prediction.bound in (*sol.BOUNDS, sol.LAUNCHES)
            assert prediction.total >= floor.total
            # A larger batch may take a config with fewer partial sums: a little time less, where launches are most.
            # "gated" has one less, and the same sums: as a share of the time with that launch.
            start = gpu.launch_seconds if prediction.schedule == "gated" else 0.0
            assert prediction.total + start >= 0.99 * (before.get(prediction.schedule, 0.0) + start)
            assert prediction.memory_bytes >= floor.memory_bytes
            before[prediction.schedule] = prediction.total


@pytest.mark.usefixtures("fake_code")
def test_passes_are_those_of_the_plan():
    """Activations are all but a few per cent; a sample's partial sums and the weights are the rest."""
    problem = Problem(paper_unit(128), 128, 56, 56, torch.float16)
    by_name = {p.schedule: p.memory_bytes / problem.tensor_bytes for p in sol.predict(problem, H100)}
    assert by_name["store"] == pytest.approx(6, rel=0.02)
    assert by_name["library"] == pytest.approx(9, rel=0.02)
    assert by_name[sol.EAGER] == 23
    assert by_name[sol.FLOOR] == 2


@pytest.mark.parametrize(
    ("dtype", "allow_tf32", "bound", "seconds"),
    [
        # Seconds for each output.
        (torch.float16, False, MATRIX, 2 * 9 * 64 / 1e14),
        (torch.float32, True, MATRIX, 2 * 9 * 64 / 5e13),
        # A warp's instruction is 32 multiply-adds, a processor of ten issues four of them per clock.
        (torch.float32, False, ISSUE, 9 * 64 / 32 / (10 * 4 * 1e9)),
    ],
)
def test_the_librarys_convolution_by_hand(dtype, allow_tf32, bound, seconds):
    """Of a dense 3x3 branch of 64 channels: as fast as the GPU multiplies; x, y and the weights are moved once."""
    problem = Problem(paper_unit(64, groups=1), 8, 14, 14, dtype, allow_tf32)
    _, _, steps = next(found for found in sol.schedules_for(problem, CHIPS["sm_90"]) if found[0] == "library")
    step = sol.times(work.convolution_work(steps[0], TOY, memory=123.0), TOY)
    assert step.seconds[bound] == pytest.approx(seconds * problem.outputs)
    assert step.work.memory_bytes == 123
    touched = 2 * problem.tensor_bytes + 64 * 64 * 9 * dtype.itemsize
    assert step.work.l2_bytes == touched
    assert work.memory_bytes(steps[:1], l2_size=0) == [touched]


def test_slices_of_the_input_are_copied_for_the_library():
    problem = Problem(paper_unit(128, groups=1, split_input=True), 8, 14, 14, torch.float16)
    _, _, steps = next(found for found in sol.schedules_for(problem, CHIPS["sm_90"]) if found[0] == "library")
    # Half of x read and written.
    assert work.convolution_work(steps[0], TOY, 0.0).memory_bytes == problem.tensor_bytes


@pytest.mark.usefixtures("fake_code")
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("split", [True, False])
def test_dense_units_take_as_long_as_the_products_everywhere(gpu, split):
    """Peers convolve by the same library: none is predicted to be faster than its products."""
    problem = Problem(paper_unit(512, groups=1, split_input=split), 128, 14, 14, torch.float16)
    products = 2 * problem.multiplies / gpu.matrix_flop_per_s["fp16"]
    by_name = {p.schedule: p for p in sol.predict(problem, gpu)}
    for name in ("library", sol.EAGER, sol.COMPILED):
        assert by_name[name].total > products
        assert by_name[name].seconds(MATRIX) >= products
    assert by_name["library"].total < by_name[sol.EAGER].total


@pytest.mark.usefixtures("fake_code")
def test_one_sample_is_bound_by_launches():
    prediction = sol.predict(Problem(paper_unit(128), 1, 7, 7, torch.float16), H100)[0]
    assert prediction.bound == sol.LAUNCHES


REAL = [
    # Block-Toeplitz tiles use 37.5 % of the multiplies at 4 channels per group; the product that pools adds some.
    (paper_unit(128, in_channels=256, split_input=True), "branch_conv_stream", 0.375, 1.3),
    # Four groups' blocks on the diagonal of one of 16 channels; sums are no products.
    (paper_unit(128), "branch_conv_window", 0.25, 1.0),
]


@pytest.fixture(scope="module")
def predicted_stores():
    """Of each unit, by its compiled kernels."""
    problems = [Problem(unit, 128, 56, 56, torch.float16) for unit, *_ in REAL]
    found = sol.predict_all(problems, H100, ["store"])
    return {problem.spec: store for problem, (store, *_) in zip(problems, found, strict=True)}


@pytest.mark.compile
@needs_narrow_products
@pytest.mark.parametrize(("unit", "kernel", "share", "besides"), REAL, ids=["stream", "window"])
def test_a_real_kernel_executes_at_least_the_useful_multiplies(
    unit, kernel, share, besides, predicted_stores
):
    problem, store = Problem(unit, 128, 56, 56, torch.float16), predicted_stores[unit]
    conv = store.steps[0]
    assert conv.work.name == kernel
    useful = 2 * 2 * 4 * 9 * problem.outputs
    executed = conv.work.warp_flop["fp16"]
    assert conv.work.is_counted
    assert 1 / share <= executed / useful <= besides / share
    assert all(conv.seconds[bound] > 0 for bound in sol.BOUNDS)
    inputs = 2 if unit.split_input else 1
    least = (inputs + 2) * problem.tensor_bytes / H100.memory_bytes_per_s
    assert store.total > conv.total > conv.seconds[MEMORY] >= least
