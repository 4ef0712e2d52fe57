"""Launchers of the backward kernels: data and weight gradients of all branches; the config's type names them."""

from collections.abc import Sequence
from typing import Any

import torch

from .branch_grad_reduce import branch_grad_reduce_kernel
from .branch_grad_stream import branch_grad_stream_kernel
from .branch_grad_wide import branch_grad_data_kernel, branch_grad_weight_kernel
from .config import GradConfig, GradStreamConfig, GradWideConfig
from .geometry import ConvShape, cdiv, known_stride, needs_64_bits, next_power_of_2
from .grad_geometry import (
    HALO,
    MAX_GRID_Y,
    PIXELS,
    branch_halo,
    grad_blocks,
    grad_programs,
    grad_refusal,
    grad_tiles,
    wide_halo,
)
from .launch import Launch
from .prefetch import can_prefetch

# Accumulators of weight gradients that a program holds: kernel rows of one branch, by kernel size. The gradients of
# linear branches take fewer registers.
ROWS_KY = {1: 1, 3: 3, 5: 2, 7: 1}
LINEAR_ROWS_KY = {1: 1, 3: 3, 5: 3, 7: 2}
ONE_BRANCH_REGISTERS = 192


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
    config: GradConfig,
) -> tuple[Launch, ...]:
    """`dx` of all branches, and the summands of their weight gradients, from the gradient of the selected output: one
    launch under GradStreamConfig; one for `dx` and one or more for each branch's weights under GradWideConfig.

    The gradient of branch m's convolution is
    `dy = mask * (gain * dv + lift) + slope * y + level`, `mask = scale * y + shift > 0`,
    all fp32: `terms [N, M, C_out, 6]`, contiguous, holds gain, lift, scale, shift, slope and level. With
    `terms [N, M, C_out, 2]`, for branches without norm, `mask = y > 0`, and slope and level are zero. Without ReLU the
    mask is all ones. The gradient is rounded to the dtype of x and never written.

    `x [N, C_in, H, W]` and `dv [N, C_out, H, W]`, channels adjacent in memory (stride 1), other strides free;
    `y [M, N, H, W, C_out]`, the convolutions' outputs, channels adjacent; `w` from `grad_weight_launch`;
    `dx [N, C_in, H, W]` of any strides; `partial` fp32, contiguous, of `partial_shape`: for `reduce_weight_grad`, which
    reads only what is written here.

    Raises:
        ValueError: a `shape` that the kernels of `config` do not take (`grad_refusal`), or channels not adjacent.
    """
    if reason := grad_refusal(shape, x.dtype, config, x.shape[3]):
        raise ValueError(f"shape: {reason}")
    for name, tensor, channels in (("x", x, x.stride(1)), ("dv", dv, dv.stride(1)), ("y", y, y.stride(4))):
        if channels != 1:
            raise ValueError(f"{name} must have adjacent channels (stride 1), got strides {tensor.stride()}")
    if isinstance(config, GradStreamConfig):
        return _stream(x, dv, y, terms, w, dx, partial, shape, has_relu, config)
    return _wide(x, dv, y, terms, w, dx, partial, shape, has_relu, config)


def _stream(
    x: torch.Tensor, dv: torch.Tensor, y: torch.Tensor, terms: torch.Tensor, w: torch.Tensor, dx: torch.Tensor,
    partial: torch.Tensor, shape: ConvShape, has_relu: bool, config: GradStreamConfig,
) -> tuple[Launch, ...]:  # fmt: skip
    n, _, h, width = x.shape
    blocks = grad_blocks(shape, config)
    tiles_h, tiles_w = grad_tiles(shape, config, h, width)
    programs, tiles_per_program = grad_programs(shape, config, n, h, width)
    reach = max(shape.dilations)
    # Nothing is read above an image; of several strips each counts as one in the middle does.
    rows = min(config.RUN_H, h) + (reach if tiles_h == 1 else 2 * reach)
    arguments = (
        x, dv, y, w, terms, dx, partial, h, width, shape.c_in, shape.c_out,
        n * tiles_h * tiles_w, tiles_h, tiles_w, tiles_per_program,
        x.stride(0), x.stride(2), x.stride(3), dv.stride(0), dv.stride(2), dv.stride(3),
        y.stride(0), y.stride(1), y.stride(2), y.stride(3),
        dx.stride(0), dx.stride(1), dx.stride(2), dx.stride(3),
    )  # fmt: skip
    is_full = blocks.ci == blocks.co == blocks.size and blocks.count * blocks.groups == shape.groups
    is_large = needs_64_bits(x, dv, y, dx)
    constexprs: dict[str, Any] = {
        **_common(shape, config, has_relu, terms, is_large),
        "M": len(shape.kernels),
        "DILATIONS": shape.dilations,
        "WINDOWS": tuple(m * reach + sum(shape.dilations[:m]) for m in range(len(shape.kernels))),
        "REACH": reach,
        "HALO": HALO,
        "HAS_CHANNEL_MASK": not is_full,
        "GROUP_CI": shape.c_in // shape.groups,
        "GROUP_CO": shape.c_out // shape.groups,
        "STRIDE_XW": known_stride(x.stride(3), shape.c_in, is_large),
        "STRIDE_DVW": known_stride(dv.stride(3), shape.c_out, is_large),
        "STRIDE_YW": known_stride(y.stride(3), shape.c_out, is_large),
        "BLOCKS": config.num_warps,
    }
    grid = (blocks.count // config.num_warps, programs)
    trips = (tiles_per_program, rows)
    # Uncapped, ptxas spills a few values for more warps a processor.
    cap = {"maxnreg": ONE_BRANCH_REGISTERS} if len(shape.kernels) == 1 else {}
    return (_prepared(branch_grad_stream_kernel, grid, arguments, constexprs, config, trips, cap),)


def _wide(
    x: torch.Tensor, dv: torch.Tensor, y: torch.Tensor, terms: torch.Tensor, w: torch.Tensor, dx: torch.Tensor,
    partial: torch.Tensor, shape: ConvShape, has_relu: bool, config: GradWideConfig,
) -> tuple[Launch, ...]:  # fmt: skip
    n, _, h, width = x.shape
    blocks = grad_blocks(shape, config)
    halo, programs = wide_halo(shape, width), partial.shape[0]
    data_tiles_h, data_tiles_w = cdiv(h, config.DATA_RUN_H), cdiv(width, PIXELS - 2 * halo)
    common = {
        **_common(shape, config, has_relu, terms, needs_64_bits(x, dv, y, dx)),
        "CHUNKS_CI": blocks.chunks_ci,
        "CHUNKS_CO": blocks.chunks_co,
    }
    offsets = [0]
    for kernel in shape.kernels:
        offsets.append(offsets[-1] + blocks.chunks_co * kernel * kernel * 256)
    pieces = blocks.count * blocks.chunks_ci
    tiles = n * data_tiles_h * data_tiles_w
    # Those beyond the grid's second axis lie along the first.
    tiles_x = next_power_of_2(cdiv(tiles, MAX_GRID_Y))
    data = _prepared(
        branch_grad_data_kernel,
        (pieces * tiles_x, cdiv(tiles, tiles_x)),
        (
            dv, y, w, terms, dx, h, width, shape.c_in, shape.c_out, tiles, data_tiles_h, data_tiles_w,
            dv.stride(0), dv.stride(2), dv.stride(3), y.stride(0), y.stride(1), y.stride(2), y.stride(3),
            dx.stride(0), dx.stride(1), dx.stride(2), dx.stride(3),
        ),
        common
        | {
            "RUN_H": config.DATA_RUN_H,
            "KERNELS": shape.kernels,
            "DILATIONS": shape.dilations,
            "W_OFFSETS": tuple(offsets),
            "HALO": halo,
            "IS_WHOLE_H": h <= config.DATA_RUN_H,
            "TILES_X": tiles_x,
        },
        config,
        (blocks.chunks_co,) * len(shape.kernels),
    )  # fmt: skip
    rows_ky = ROWS_KY if common["HAS_NORM"] or has_relu else LINEAR_ROWS_KY
    is_prefetched = config.PREFETCH and all(map(can_prefetch, (x, dv, *y.permute(0, 1, 4, 2, 3))))
    launches, tap = [data], 0
    tiles_h = cdiv(h, config.RUN_H)
    for m, (kernel, dilation) in enumerate(zip(shape.kernels, shape.dilations, strict=True)):
        # Its own halo: a branch of small reach has fewer tiles.
        halo = branch_halo(kernel, dilation, width)
        tiles_w = cdiv(width, PIXELS - 2 * halo)
        tiles_per_program = cdiv(n * tiles_h * tiles_w, programs)
        for first in range(0, kernel, rows_ky.get(kernel, 1)):
            arguments = (
                x, dv, y[m], terms[:, m], partial[:, :, tap:], h, width, shape.c_in, shape.c_out,
                n * tiles_h * tiles_w, tiles_h, tiles_w, tiles_per_program,
                x.stride(0), x.stride(2), x.stride(3), dv.stride(0), dv.stride(2), dv.stride(3),
                y.stride(1), y.stride(2), y.stride(3), terms.stride(0), partial.stride(0), partial.stride(1),
            )  # fmt: skip
            constexprs = common | {
                "KERNEL": kernel,
                "DILATION": dilation,
                "KY": first,
                "HALO": halo,
                "PREFETCH": is_prefetched,
                "ROWS_KY": min(rows_ky.get(kernel, 1), kernel - first),
                "GROUP_CI": shape.c_in // shape.groups,
                "GROUP_CO": shape.c_out // shape.groups,
            }
            grid = (pieces * blocks.chunks_co, programs)
            trips = (tiles_per_program,)
            launches.append(_prepared(branch_grad_weight_kernel, grid, arguments, constexprs, config, trips))
        tap += kernel * kernel
    return tuple(launches)


def _common(
    shape: ConvShape, config: GradConfig, has_relu: bool, terms: torch.Tensor, is_large: bool
) -> dict[str, Any]:
    """Constexprs that all kernels have."""
    blocks = grad_blocks(shape, config)
    return {
        "RUN_H": config.RUN_H,
        "CHANNELS_CI": blocks.ci,
        "CHANNELS_CO": blocks.co,
        "HAS_RELU": has_relu,
        "HAS_NORM": terms.shape[3] == 6,
        "IS_LARGE": is_large,
    }


def _prepared(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constexprs: dict[str, Any],
    config: GradConfig,
    trips: tuple[int, ...],
    cap: dict[str, Any] | None = None,
) -> Launch:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **(cap or {})}
    return Launch(kernel, grid, arguments, constexprs, options, trips)


def reduce_weight_grad(
    partial: torch.Tensor, dw: Sequence[torch.Tensor], *, shape: ConvShape, config: GradConfig
) -> tuple[Launch, ...]:
    """Weight gradients `dw[m] [c_out, c_in / groups, k, k]`, of any dtype and strides, from the summands of
    `branch_grad`, a launch for each branch. The order of the summation is fixed.
    """
    terms, count, _, block_co, group_ci = partial.shape
    blocks = grad_blocks(shape, config)
    launches, before = [], 0
    for kernel, out in zip(shape.kernels, dw, strict=True):
        entries = count * kernel * kernel * block_co * group_ci
        constexprs = {
            "KERNEL": kernel,
            "TAPS": kernel * kernel,
            "TAPS_BEFORE": before,
            "STRIDE_BLOCK": partial.stride(1),
            "GROUPS_PER_BLOCK": blocks.groups,
            "GROUP_CI": group_ci,
            "GROUP_CO": shape.c_out // shape.groups,
            "BLOCK_CO": block_co,
            "CHUNKS_CO": blocks.chunks_co,
            "BLOCK_T": 32,
            "BLOCK_E": 32,
        }
        launches.append(
            Launch(
                branch_grad_reduce_kernel,
                (cdiv(entries, 32),),
                (partial, out, terms, entries, shape.groups, partial.stride(0), *out.stride()),
                constexprs,
                {"num_warps": 4},
            )
        )
        before += kernel * kernel
    return tuple(launches)
