"""Configs of the gate from shapes alone."""

from __future__ import annotations

import torch

from ..chips import Chip
from ..kernels.config import GateConfig
from ..kernels.geometry import cdiv, next_power_of_2

# Pooled sums (in 16 bits, in fp32) and weights that eight warps of the gate load at a time and keep in registers, and
# tiles of a sample.
GATE_SUMS = (8192, 4096)
MAX_GATE_WEIGHTS = 32768
GATE_TILES = 32


def gate_config(m: int, c: int, d: int, n: int, dtype: torch.dtype, chip: Chip) -> GateConfig:
    """Config for `m` branches, `c` channels and a descriptor of `d` entries of each of `n` samples."""
    # Products of fp32 operands run without tensor cores and hold both in registers.
    widest, columns, longest = (64, 64, 32) if dtype == torch.float32 else (128, 128, 512)
    block_c = max(16, min(next_power_of_2(c), columns // next_power_of_2(m)))
    block_d = min(widest, max(16, next_power_of_2(d)))
    # A program takes as long as its loads: as few samples each as leave no more programs than run at once.
    block_n = 16
    while block_n > 1 and 2 * cdiv(n, block_n) * cdiv(c, block_c) <= chip.processors:
        block_n //= 2
    elements = MAX_GATE_WEIGHTS // (2 if chip.is_amd else 1)
    block_s = min(longest, elements // block_d, max(16, next_power_of_2(c)))
    return GateConfig(
        BLOCK_N=block_n,
        BLOCK_S=block_s,
        BLOCK_D=block_d,
        BLOCK_C=block_c,
        BLOCK_T=gate_tiles(block_n, block_s, GATE_SUMS[dtype == torch.float32]),
        num_warps=8,
    )


def gate_tiles(block_n: int, block_s: int, sums: int) -> int:
    """Tiles of BLOCK_N samples and BLOCK_S channels that are `sums` sums."""
    return min(GATE_TILES, max(1, sums // (block_n * block_s)))
