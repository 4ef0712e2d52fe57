"""Configs of the selection and of sums over pixels, from shapes alone."""

from __future__ import annotations

from ..chips import Chip
from ..kernels.config import ReductionConfig, SelectConfig
from ..kernels.geometry import cdiv, next_power_of_2

# Chips that sum so many pixels at a time without spills.
WIDE_STEPS_CHIPS = ("sm_90",)
# Warps per processor that keep memory busy.
BUSY_WARPS = 16
# Pixels of an image below which one warp at a time sums them.
SMALL_IMAGE = 512
# Tiles of a sample past which the gate would walk long.
MAX_POOLED_TILES = 32


def select_config(pixels: int, c: int) -> SelectConfig:
    """Config for an output of `pixels` pixels and `c` channels: about 4096 elements per program."""
    block_c = min(128, next_power_of_2(c))
    return SelectConfig(BLOCK_P=min(4096 // block_c, max(1, next_power_of_2(pixels))), BLOCK_C=block_c)


def reduction_config(m: int, pixels: int, c: int, chip: Chip) -> ReductionConfig:
    """Config for sums over the `pixels` pixels of a sample of `m` branches: 64 at a time and four warps, of which each
    thread loads 64 bytes of a 16-bit tensor, in programs of up to four such steps; 16 and one warp where images are
    small. Half of that on chips but sm_90, whose compilers spill more, some in bf16 alone.

    The fastest of ten on an H100 for both sums of a training step at 128@56² (221 µs; up to eight steps 234, though
    they pool in 91 in place of 95), and within 3 % at 512@14². With 32 at a time they are 4 to 5 % slower; one branch
    takes that, since the compiler would spill to make room for more programs.
    """
    block_c = min(64, next_power_of_2(c))
    is_wide = chip.name in WIDE_STEPS_CHIPS
    if pixels < SMALL_IMAGE:
        block_p = min((1024 if is_wide else 512) // block_c, next_power_of_2(pixels))
        return ReductionConfig(block_p, block_c, min(16, cdiv(pixels, block_p)), num_warps=1)
    block_p = (4096 if m > 1 and is_wide else 2048) // block_c
    blocks = cdiv(pixels, block_p)
    most = 4 * 4096 // (block_p * block_c)
    return ReductionConfig(block_p, block_c, cdiv(blocks, cdiv(blocks, most)), num_warps=4)


def pooled_sums_config(n: int, pixels: int, c: int, chip: Chip) -> ReductionConfig:
    """Config for the pooled sums of `n` samples: up to 16384 elements per program, 1024 at a time, in shorter programs
    where those leave processors idle.

    One warp: what its threads share at the end are sums of four pixels, where more would go through shared memory.
    """
    block_c = min(64, next_power_of_2(c))
    block_p = min(1024 // block_c, next_power_of_2(pixels))

    def tiles(steps: int) -> int:
        return cdiv(pixels, block_p * steps)

    steps = min(16, cdiv(pixels, block_p))
    while (
        steps > 1
        and n * tiles(steps) * cdiv(c, block_c) < BUSY_WARPS * chip.processors
        and tiles(cdiv(steps, 2)) <= MAX_POOLED_TILES
    ):
        steps = cdiv(steps, 2)
    return ReductionConfig(BLOCK_P=block_p, BLOCK_C=block_c, STEPS=steps, num_warps=1)
