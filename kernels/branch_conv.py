"""Launcher of the branch convolutions: the config's type names the kernel."""

import torch

from .branch_conv_depthwise import branch_conv_depthwise_fwd_kernel
from .branch_conv_stream import branch_conv_stream_fwd_kernel
from .branch_conv_tap import branch_conv_tap_fwd_kernel
from .config import BranchConfig, DepthwiseConfig, StreamConfig
from .geometry import ConvShape, blocking, cdiv, lattice, tiles

BLOCK_POOL = 8  # narrowest right operand of a tensor-core product; also the longest run


def branch_conv_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    u: torch.Tensor,
    partial: torch.Tensor,
    *,
    shape: ConvShape,
    has_relu: bool,
    allow_tf32: bool,
    config: BranchConfig,
) -> None:
    """All branches of `shape` in one launch: `u[m] = act(conv_m(x) + shift[m])` and its pooled sums.

    `x [N, C, H_in, W_in]`, channels adjacent in memory (stride 1), other strides free; `w` from `pack_branch_weights`;
    `shift [M, C_out]` fp32; `u [M, N, H, W, C_out]`, channels adjacent; `partial [N, tiles, C_out]` fp32 receives the
    sums over branches and each tile's pixels (`tiles` as `geometry.tiles`). Output dtype is that of `u`.
    """
    kernel, arguments, constexprs, launch = plan_branch_conv_launch(
        x, w, shift, u, partial, shape=shape, has_relu=has_relu, allow_tf32=allow_tf32, config=config
    )
    kernel[launch["grid"]](
        *arguments, **constexprs, num_warps=launch["num_warps"], num_stages=launch["num_stages"]
    )


def plan_branch_conv_launch(x, w, shift, u, partial, *, shape, has_relu, allow_tf32, config):
    """The launch that `branch_conv_fwd` makes, as (kernel, arguments, constexprs, grid and options); nothing is run."""
    n, _, h_in, w_in = x.shape
    _, _, h, w_out, _ = u.shape
    layout = blocking(shape, config)
    tiles_h, tiles_w = tiles(shape, config, h, w_out)
    is_depthwise = isinstance(config, DepthwiseConfig)
    is_stream = isinstance(config, StreamConfig)
    blocks_per_program = config.BLOCKS_PER_PROGRAM if is_stream else 1
    programs = cdiv(layout.blocks, blocks_per_program)
    extent_x = (config.BLOCK_N - 1) * x.stride(0) + (h_in - 1) * x.stride(2) + (w_in - 1) * x.stride(3)
    extent_u = (config.BLOCK_N - 1) * u.stride(1) + (h - 1) * u.stride(2) + (w_out - 1) * u.stride(3)
    arguments = (
        x, w, u if shift is None else shift, u, partial,
        n, h_in, w_in, h, w_out, *([] if is_depthwise else [shape.c_in]), shape.c_out, tiles_h, tiles_w, programs,
        x.stride(0), x.stride(2), x.stride(3), u.stride(0), u.stride(1), u.stride(2), u.stride(3),
        partial.stride(0), partial.stride(1),
    )  # fmt: skip
    constexprs = {
        "KERNELS": shape.kernels,
        "DILATIONS": lattice(shape),
        "SPACINGS": layout.spacings,
        "W_OFFSETS": layout.offsets,
        "STRIDE": shape.stride,
        "SPLIT_CI": shape.c_in if shape.is_split else 0,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_H": config.BLOCK_H,
        "BLOCK_W": config.BLOCK_W,
        "HAS_SHIFT": shift is not None,
        "HAS_RELU": has_relu,
        "IS_LARGE": max(extent_x, extent_u) + shape.c_out >= 2**31,
    }
    if is_depthwise:
        constexprs |= {"BLOCK_C": config.BLOCK_C, "RUN_H": config.RUN_H}
        kernel = branch_conv_depthwise_fwd_kernel
    else:
        is_full = (
            layout.channels_ci == layout.chunks * config.BLOCK_CI
            and layout.channels_co == layout.blocks_per_group * config.BLOCK_CO
            and layout.blocks % blocks_per_program == 0
            and shape.groups % layout.groups_per_block == 0
        )
        constexprs |= {
            "SPANS": layout.spans,
            "CHANNELS_CI": layout.channels_ci,
            "CHANNELS_CO": layout.channels_co,
            "BLOCK_CI": config.BLOCK_CI,
            "BLOCK_CO": config.BLOCK_CO,
            "RUN_W": config.RUN_W,
            "BLOCK_POOL": BLOCK_POOL,
            # Pooling on the tensor core multiplies by 0 or 1: a NaN would reach the other samples of its tile, and
            # fp32 sums would be rounded to TF32.
            "POOL_BY_DOT": config.BLOCK_N == 1 and x.element_size() == 2,
            "HAS_CHANNEL_MASK": not is_full,
            "PRECISION": "tf32" if allow_tf32 else "ieee",
        }
        if is_stream:
            constexprs |= {
                "RUN_H": config.RUN_H,
                "BLOCKS_PER_PROGRAM": blocks_per_program,
                "IS_EVEN_H": tuple(h % (config.RUN_H * s) == 0 for s in layout.spacings),
            }
            kernel = branch_conv_stream_fwd_kernel
        else:
            constexprs |= {"BLOCKS_PER_GROUP": layout.blocks_per_group, "K_CHUNKS": layout.chunks}
            kernel = branch_conv_tap_fwd_kernel
    launch = {
        "grid": (cdiv(n, config.BLOCK_N) * tiles_h * tiles_w * programs,),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return kernel, arguments, constexprs, launch
