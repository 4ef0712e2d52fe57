"""What the training kernels read of the branches' norms and biases, from parameters of any dtype, each by itself."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .geometry import cdiv
from .launch import Launch

BLOCK_C = 128


@triton.jit
def stack_vectors_kernel(
    vector_ptrs, stacked_ptr,
    C,
    DEFAULTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of every vector; a row of DEFAULTS is no vector where it is None, else the row's value."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    for i in tl.static_range(len(DEFAULTS)):
        if DEFAULTS[i] is None:
            vector = tl.load(vector_ptrs[i] + c, mask=mask, other=0.0).to(tl.float32)
        else:
            vector = tl.full([BLOCK_C], DEFAULTS[i], tl.float32)
        tl.store(stacked_ptr + i * C + c, vector, mask=mask)


@triton.jit
def norm_scale_shift_kernel(
    mean_ptr, rstd_ptr, affine_ptr, bias_ptr, scale_ptr, shift_ptr,
    C,
    BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C of the channels of all branches."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    if HAS_BIAS:
        mean -= tl.load(bias_ptr + c, mask=mask, other=0.0)
    scale = tl.load(affine_ptr + C + c, mask=mask, other=0.0) * tl.load(rstd_ptr + c, mask=mask, other=0.0)
    beta = tl.load(affine_ptr + c, mask=mask, other=0.0)
    tl.store(scale_ptr + c, scale, mask=mask)
    tl.store(shift_ptr + c, beta - scale * mean, mask=mask)


def stack_vectors(
    vectors: Sequence[torch.Tensor | None], defaults: Sequence[float], stacked: torch.Tensor
) -> Launch:
    """Write `stacked [rows, C]` fp32: the `vectors [C]`, and the row's default where there is none."""
    c = stacked.shape[1]
    arguments = (tuple(stacked if vector is None else vector for vector in vectors), stacked, c)
    constexprs = {
        "DEFAULTS": tuple(
            None if vector is not None else default for vector, default in zip(vectors, defaults, strict=True)
        ),
        "BLOCK_C": BLOCK_C,
    }
    return Launch(stack_vectors_kernel, (cdiv(c, BLOCK_C),), arguments, constexprs, {"num_warps": 1})


def norm_scale_shift(
    mean: torch.Tensor,
    rstd: torch.Tensor,
    affine: torch.Tensor,
    biases: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> Launch:
    """Write `scale` and `shift`, with which `scale * conv + shift` is the normalized convolution without bias.

    All `[M, C]` fp32, but for `affine [2, M, C]`, beta and gamma.
    """
    count = mean.numel()
    arguments = (mean, rstd, affine, mean if biases is None else biases, scale, shift, count)
    constexprs = {"BLOCK_C": BLOCK_C, "HAS_BIAS": biases is not None}
    return Launch(norm_scale_shift_kernel, (cdiv(count, BLOCK_C),), arguments, constexprs, {"num_warps": 1})
