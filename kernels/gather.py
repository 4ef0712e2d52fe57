"""Weights in the order in which kernels read them, by one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import BranchConfig, GradConfig
from .geometry import ConvShape, cdiv
from .grad_geometry import grad_weight_order
from .launch import Launch
from .weight_orders import branch_weight_order, in_memory

BLOCK = 1024


@triton.jit(do_not_specialize=("ENTRIES", "C", "FAN_IN"))
def gather_fwd_kernel(
    weight_ptrs, scale_ptr, rest_ptr, index_ptr, packed_ptr,
    ENTRIES, C, FAN_IN,
    KERNELS: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """BLOCK entries, from weights `[C, FAN_IN, KERNELS[m], KERNELS[m]]` one after another; `rest` comes last."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < ENTRIES
    offs = tl.load(index_ptr + i, mask=mask, other=0)
    value = tl.zeros([BLOCK], tl.float32)
    for m in tl.static_range(len(KERNELS)):
        size = FAN_IN * (KERNELS[m] * KERNELS[m])
        own = mask & (offs >= 0) & (offs < C * size)
        weight = tl.load(weight_ptrs[m] + offs, mask=own, other=0.0).to(tl.float32)
        if HAS_SCALE:
            weight *= tl.load(scale_ptr + m * C + offs // size, mask=own, other=0.0)
        value = tl.where(own, weight, value)
        offs -= C * size
    is_rest = mask & (offs >= 0)
    value = tl.where(is_rest, tl.load(rest_ptr + offs, mask=is_rest, other=0.0).to(tl.float32), value)
    tl.store(packed_ptr + i, value.to(packed_ptr.dtype.element_ty), mask=mask)


def gather_fwd(
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    index: torch.Tensor,
    rest: torch.Tensor,
    packed: torch.Tensor,
) -> Launch:
    """Write `packed [entries]`: the elements that `index [entries]` names of the `weights [C, fan_in, k, k]`, as they
    lie in memory one weight after another, and of `rest` behind them.

    The weights fill their memory without gaps, their first axis outermost; `scale [M, C]` fp32 multiplies it.
    """
    c, fan_in = weights[0].shape[:2]
    arguments = (
        tuple(weights), rest if scale is None else scale, rest, index, packed, index.numel(), c, fan_in,
    )  # fmt: skip
    constexprs = {
        "KERNELS": tuple(weight.shape[-1] for weight in weights),
        "BLOCK": BLOCK,
        "HAS_SCALE": scale is not None,
    }
    grid, options = (cdiv(index.numel(), BLOCK),), {"num_warps": 4}
    return Launch(gather_fwd_kernel, grid, arguments, constexprs, options, kept=(index, rest))


def branch_weight_launch(
    weights: Sequence[torch.Tensor],
    shape: ConvShape,
    config: BranchConfig,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Launch]:
    """`weights[m] [c_out, c_in / groups, k, k]`, as `in_memory` takes them, packed for the kernel of `config` in
    `dtype` (`weight_orders.branch_weight_order`), and the launch that does it. `scale [M, C]` fp32 multiplies the
    outputs' channels, in fp32."""
    first = weights[0]
    index, end = branch_weight_order(shape, config, dtype, first.dtype, first.device, in_memory(weights))
    packed = first.new_empty(index.shape, dtype=dtype)
    return packed, gather_fwd(weights, scale, index, end, packed)


def grad_weight_launch(
    weights: Sequence[torch.Tensor], shape: ConvShape, config: GradConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, Launch]:
    """`weights[m] [c_out, c_in / groups, k, k]`, as `in_memory` takes them, packed for `branch_grad` under `config` in
    `dtype`, and the launch that does it: transposed and rotated, each 16 x 16 matrix in the order of the tensor core's
    registers.

    GradStreamConfig: `[blocks][M][3][2]` matrices of input `(o, ci)` and gradient `(h, co)`: of kernel row ky, the
    weight of row `2 - ky` and column `o - j + 2`, where point j of a run is `1 + h` in the first matrix, 3 and 0 in the
    second; then the six 0/1 matrices that move data between threads.
    GradWideConfig: `[blocks][pieces of ci][M][pieces of co][k][k]` matrices of input and output channels.
    """
    first = weights[0]
    index, end = grad_weight_order(shape, config, first.dtype, first.device, in_memory(weights))
    packed = first.new_empty(index.shape, dtype=dtype)
    return packed, gather_fwd(weights, None, index, end, packed)
