"""Launchers of the backward kernels: data and weight gradients of all branches of a unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .branch_grad_reduce import branch_grad_reduce_kernel
from .branch_grad_stream import branch_grad_stream_kernel
from .config import GradStreamConfig
from .geometry import ConvShape, cdiv
from .launch import Launch

# Fixed by the formulation: runs of a tile's row, their halo, channels of a block.
RUNS, HALO, BLOCK = 16, 2, 8


def can_run_grad(shape: ConvShape, dtype: torch.dtype) -> str | None:
    """Why no kernel computes the gradients of `shape` in `dtype`; None if one does."""
    widths = shape.c_in // shape.groups, shape.c_out // shape.groups
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}, and the gradients are computed in torch.float16 and torch.bfloat16"
    if shape.stride != 1:
        return f"the stride is {shape.stride}, and gradients need stride 1"
    if shape.is_split:
        return "split_input: the branches read channels of their own"
    if max(widths) > BLOCK:
        return f"a group has {max(widths)} channels, and gradients take at most {BLOCK}"
    if set(shape.kernels) != {3} or not set(shape.dilations) <= {1, 2}:
        return f"gradients need 3x3 kernels of dilation 1 or 2, got {shape.kernels} and {shape.dilations}"
    if len(shape.kernels) > 2:
        return f"{len(shape.kernels)} branches have more weight gradients than registers hold; at most 2"
    return None


@dataclass(frozen=True)
class GradBlocks:
    """Channel blocks of a backward launch: whole groups, padded to BLOCK channels."""

    groups: int
    ci: int
    co: int
    count: int


def grad_blocks(shape: ConvShape) -> GradBlocks:
    group_ci, group_co = shape.c_in // shape.groups, shape.c_out // shape.groups
    groups = min(shape.groups, BLOCK // max(group_ci, group_co))
    return GradBlocks(groups, groups * group_ci, groups * group_co, cdiv(shape.groups, groups))


def grad_tiles(config: GradStreamConfig, h: int, w: int) -> tuple[int, int]:
    """Tiles along height and width of an `h` x `w` image."""
    return cdiv(h, config.RUN_H), cdiv(w, 2 * RUNS - 2 * HALO)


def partial_shape(shape: ConvShape, config: GradStreamConfig, n: int, h: int, w: int) -> tuple[int, ...]:
    """Shape of the fp32 workspace for images of `h` x `w` pixels: summands, channel blocks, and a block's weights."""
    tiles_h, tiles_w = grad_tiles(config, h, w)
    strips = cdiv(n * tiles_h * tiles_w, config.TILES_PER_PROGRAM)
    taps = sum(k * k for k in shape.kernels)
    return 2 * strips, grad_blocks(shape).count, taps, BLOCK, shape.c_in // shape.groups


def pack_grad_weights(weights: Sequence[torch.Tensor], shape: ConvShape, dtype: torch.dtype) -> torch.Tensor:
    """Pack `weights[m] [c_out, c_in / groups, 3, 3]` for `branch_grad`, rounded to `dtype`.

    `[blocks][M][3][2][16][16]`, transposed and rotated: the entry for kernel row ky, input `(o, ci)` and gradient
    `(half of co, h, co)` is the weight of row `2 - ky` and column `o - j + 2`, where point j of a run is `1 + h` in the
    first matrix, and 3 and 0 in the second. Each matrix is in the order of the tensor core's registers.
    """
    blocks = grad_blocks(shape)
    group_ci, group_co = shape.c_in // shape.groups, shape.c_out // shape.groups
    block, ky, part, o, ci, half, h, co = (
        torch.arange(size).reshape([-1 if axis == i else 1 for i in range(8)])
        for axis, size in enumerate((blocks.count, 3, 2, 2, BLOCK, 2, 2, 4))
    )
    co = half * 4 + co
    kx = o + 2 - torch.where(part == 0, 1 + h, 3 * (1 - h))
    group = block * blocks.groups + co // group_co
    mask = (kx >= 0) & (kx < 3) & (ci < blocks.ci) & (co < blocks.co) & (group < shape.groups)
    mask = mask & (ci // group_ci == co // group_co)
    index = (((group * group_co + co % group_co) * group_ci + ci % group_ci) * 3 + 2 - ky) * 3 + kx
    index, mask = torch.where(mask, index, 0), mask.expand(torch.broadcast_shapes(mask.shape, index.shape))
    packed = []
    for weight in weights:
        taken = weight.reshape(-1)[index.to(weight.device)]
        taken = torch.where(mask.to(weight.device), taken, taken.new_zeros(()))
        # (row half, row, column half, thread, parity) of each matrix, in the order of a thread's registers.
        packed.append(taken.reshape(blocks.count, 1, 6, 2, 8, 2, 4, 2).permute(0, 1, 2, 4, 6, 5, 3, 7))
    return torch.cat(packed, 1).to(dtype).reshape(-1)


def branch_grad(
    x: torch.Tensor,
    dv: torch.Tensor,
    y: torch.Tensor,
    terms: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    partial: torch.Tensor,
    *,
    shape: ConvShape,
    has_relu: bool,
    config: GradStreamConfig,
) -> Launch:
    """`dx` of all branches, and the summands of their weight gradients, from the gradient of the selected output.

    The gradient of branch m's convolution is
    `dy = mask * (gain * dv + lift) + slope * y + level`, `mask = scale * y + shift > 0`,
    all fp32: `terms [N, M, C_out, 6]`, contiguous, in this order: gain, lift, scale, shift, slope, level. With `terms [N, M,
    C_out, 2]`, for branches without norm, `mask = y > 0`, slope and level are zero. Without ReLU the mask is all ones. It is rounded to the dtype of x, never written.

    `x [N, C_in, H, W]` and `dv [N, C_out, H, W]`, channels adjacent in memory (stride 1), other strides free; `y [M, N,
    H, W, C_out]`, the convolutions' outputs, channels adjacent; `w` from `pack_grad_weights`; `dx [N, C_in, H, W]` of any strides;
    `partial` fp32, contiguous, of `partial_shape`: pass it to `reduce_weight_grad`. Every entry that it reads is written.

    Raises:
        ValueError: `shape` that no kernel runs (`can_run_grad`), or channels that are not adjacent.
    """
    if (reason := can_run_grad(shape, x.dtype)) is not None:
        raise ValueError(f"shape: {reason}")
    for name, tensor, channels in (("x", x, x.stride(1)), ("dv", dv, dv.stride(1)), ("y", y, y.stride(4))):
        if channels != 1:
            raise ValueError(f"{name} must have adjacent channels (stride 1), got strides {tensor.stride()}")
    n, _, h, width = x.shape
    blocks = grad_blocks(shape)
    tiles_h, tiles_w = grad_tiles(config, h, width)
    tiles = n * tiles_h * tiles_w
    extents = [
        (h - 1) * t.stride(2) + (width - 1) * t.stride(3) + (t.shape[1] - 1) * t.stride(1)
        for t in (x, dv, y[0].permute(0, 3, 1, 2), dx)
    ]
    arguments = (
        x, dv, y, w, terms, dx, partial,
        h, width, shape.c_in, shape.c_out, tiles, tiles_h, tiles_w, config.TILES_PER_PROGRAM,
        x.stride(0), x.stride(2), x.stride(3), dv.stride(0), dv.stride(2), dv.stride(3),
        y.stride(0), y.stride(1), y.stride(2), y.stride(3),
        dx.stride(0), dx.stride(1), dx.stride(2), dx.stride(3),
    )  # fmt: skip
    constexprs: dict[str, Any] = {
        "M": len(shape.kernels),
        "DILATIONS": shape.dilations,
        "HALO": HALO,
        "RUN_H": config.RUN_H,
        "CHANNELS_CI": blocks.ci,
        "CHANNELS_CO": blocks.co,
        "GROUP_CI": shape.c_in // shape.groups,
        "GROUP_CO": shape.c_out // shape.groups,
        "IS_EVEN_H": h % config.RUN_H == 0,
        "IS_PAIRED": shape.c_in == shape.c_out and 4 % (shape.c_in // shape.groups) == 0,
        "HAS_RELU": has_relu,
        "HAS_NORM": terms.shape[3] == 6,
        "HAS_CHANNEL_MASK": blocks.ci != BLOCK or blocks.co != BLOCK or blocks.count * blocks.groups != shape.groups,
        "IS_LARGE": max(extents) >= 2**31,
    }
    return Launch(
        branch_grad_stream_kernel,
        (blocks.count, cdiv(tiles, config.TILES_PER_PROGRAM)),
        arguments,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        (config.TILES_PER_PROGRAM,),
    )


def reduce_weight_grad(
    partial: torch.Tensor, dw: Sequence[torch.Tensor], *, shape: ConvShape
) -> tuple[Launch, ...]:
    """Weight gradients `dw[m] [c_out, c_in / groups, k, k]` (contiguous) from the summands of `branch_grad`, a launch
    for each branch. The order of the summation is fixed.
    """
    terms, count, _, block_co, group_ci = partial.shape
    launches, before = [], 0
    for kernel, out in zip(shape.kernels, dw, strict=True):
        entries = count * kernel * kernel * block_co * group_ci
        constexprs = {
            "TAPS": kernel * kernel,
            "TAPS_BEFORE": before,
            "STRIDE_BLOCK": partial.stride(1),
            "GROUPS_PER_BLOCK": grad_blocks(shape).groups,
            "GROUP_CI": group_ci,
            "GROUP_CO": shape.c_out // shape.groups,
            "BLOCK_CO": block_co,
            "BLOCK_T": 32,
            "BLOCK_E": 32,
        }
        launches.append(
            Launch(
                branch_grad_reduce_kernel,
                (cdiv(entries, 32),),
                (partial, out, terms, entries, shape.groups, partial.stride(0)),
                constexprs,
                {"num_warps": 4},
            )
        )
        before += kernel * kernel
    return tuple(launches)
