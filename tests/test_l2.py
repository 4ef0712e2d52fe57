"""What the window kernels ask of L2: lines that it looks up, and bytes of merged tiles."""

import pytest
import torch

from sk_triton.bench.compiled.footprint import footprint
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.bench.model import l2
from sk_triton.bench.model import speed_of_light as sol
from sk_triton.bench.model.speed_of_light import Problem
from sk_triton.chips import CHIPS

from .versions import needs_narrow_products

pytestmark = needs_narrow_products


@pytest.mark.parametrize(
    ("blocks", "prefetch", "segment"), [(1, False, 32), (2, True, 64), (4, True, 128), (4, False, 32)]
)
def test_a_window_asks_for_a_sector_of_a_line_unless_warps_do_so_together(blocks, prefetch, segment):
    problem = Problem(paper_unit(128), 8, 28, 28, torch.float16)
    _, _, steps = sol.schedules_for(problem, CHIPS["sm_90"], ("recompute",))[0]
    options = {**steps[0].constexprs, "BLOCKS": blocks, "PREFETCH": prefetch}
    assert l2.l2_requests(steps[0]._replace(constexprs=options), 1024.0) == 1024 / segment


def test_warps_write_lines_together_whatever_they_fetch():
    problem = Problem(paper_unit(128), 8, 28, 28, torch.float16)
    _, _, steps = sol.schedules_for(problem, CHIPS["sm_90"], ("recompute",))[0]
    options = {**steps[-1].constexprs, "BLOCKS": 4, "PREFETCH": False}
    written = 8 * 128 * 28 * 28 * 2
    assert l2.l2_requests(steps[-1]._replace(constexprs=options), 3.0 * written) == written * (
        2 / 32 + 1 / 128
    )


def test_rows_that_are_fetched_ahead_are_looked_up_once_more():
    problem = Problem(paper_unit(128), 8, 28, 28, torch.float16)
    _, _, steps = sol.schedules_for(problem, CHIPS["sm_90"], ("recompute",))[0]
    options = {**steps[0].constexprs, "BLOCKS": 1, "PREFETCH": True}
    x_lines = 8 * 128 * 28 * 28 * 2 / 128
    assert l2.l2_requests(steps[0]._replace(constexprs=options), 1024.0) == 1024 / 32 + x_lines


def test_tiles_of_the_merged_convolution_read_as_far_as_any_tap():
    """Against every program's pixels, collected one by one."""
    n, size = 3, 17
    problem = Problem(classic_unit(128), n, size, size, torch.float16)
    _, plan, steps = sol.schedules_for(problem, CHIPS["sm_90"], ("merged",))[0]
    conv, config = steps[-1], plan.merged_launch.conv
    height, width = config.BLOCK_H * config.RUN_H, config.BLOCK_W * config.RUN_W
    tiles: dict[tuple[int, int], set] = {}
    for y in range(size):
        for x in range(size):
            pixels = tiles.setdefault((y // height, x // width), set())
            reached = ((y + dy, x + dx) for dy in range(-2, 3) for dx in range(-2, 3))
            pixels.update(
                (row, column) for row, column in reached if 0 <= min(row, column) <= max(row, column) < size
            )
    named = dict(zip(conv.kernel.arg_names, conv.arguments, strict=False))
    read = n * sum(map(len, tiles.values())) * 128 * 2
    weights = named["w_ptr"].numel() * 2 * n * len(tiles)
    once = sum(footprint(conv).values()) - sum(
        named[name].numel() * named[name].element_size() for name in ("x_ptr", "w_ptr")
    )
    assert l2.tile_bytes(conv) == read + weights + once
