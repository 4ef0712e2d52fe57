"""Sums over pixels by the threads that load them, so that a thread has few sums and many loads in flight."""

import torch
import triton
import triton.language as tl

from .config import ReductionConfig


@triton.jit
def lane_sums(values, LANES_P: tl.constexpr):
    """Sums of `values [BLOCK_P, channels]` over the pixels that are equal modulo LANES_P. [LANES_P, channels]"""
    if values.shape[0] > LANES_P:
        values = tl.reshape(values, [values.shape[0] // LANES_P, LANES_P, values.shape[1]])
        return tl.sum(values, axis=0)
    else:
        return values


def lanes(dtype: torch.dtype, config: ReductionConfig) -> int:
    """Pixels that the threads of a program load 16 bytes each of at a time: what a thread loads of BLOCK_P beyond that
    it adds to sums of its own."""
    return max(1, min(config.BLOCK_P, 512 * config.num_warps // dtype.itemsize // config.BLOCK_C))
