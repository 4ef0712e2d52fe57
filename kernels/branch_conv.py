"""Launcher of the branch convolutions: the config's type names the kernel."""

import torch
import triton

from .branch_conv_depthwise import branch_conv_depthwise_fwd_kernel
from .branch_conv_stream import branch_conv_stream_fwd_kernel
from .branch_conv_tap import branch_conv_tap_fwd_kernel
from .config import BranchConfig, DepthwiseConfig, StreamConfig, TapConfig
from .geometry import Blocking, ConvShape, blocking, cdiv, lattice, tiles
from .launch import Launch

# Columns of the product that pools a tile, one per position in a run: the fewest that Triton takes.
BLOCK_POOL = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16


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
) -> Launch:
    """All branches of `shape` in one launch: `u[m] = act(conv_m(x) + shift[m])` and its pooled sums.

    `x [N, C, H_in, W_in]`, channels adjacent in memory (stride 1), other strides free; `w` from `pack_branch_weights`;
    `shift [M, C_out]` fp32; `u [M, N, H, W, C_out]`, channels adjacent; `partial [N, tiles, C_out]` fp32, receives the
    sums over branches and each tile's pixels (`tiles` as `geometry.tiles`). Results are rounded to the dtype of `u`.
    """
    n, _, h_in, w_in = x.shape
    _, _, h, w_out, _ = u.shape
    layout = blocking(shape, config)
    tiles_h, tiles_w = tiles(shape, config, h, w_out)
    programs = layout.blocks // (config.BLOCKS_PER_PROGRAM if isinstance(config, StreamConfig) else 1)
    extent_x = (config.BLOCK_N - 1) * x.stride(0) + (h_in - 1) * x.stride(2) + (w_in - 1) * x.stride(3)
    extent_u = (config.BLOCK_N - 1) * u.stride(1) + (h - 1) * u.stride(2) + (w_out - 1) * u.stride(3)
    channels = [shape.c_out] if isinstance(config, DepthwiseConfig) else [shape.c_in, shape.c_out]
    arguments = (
        x, w, u if shift is None else shift, u, partial,
        n, h_in, w_in, h, w_out, *channels, tiles_h, tiles_w, programs,
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
        "HAS_SHIFT": shift is not None,
        "HAS_RELU": has_relu,
        "IS_LARGE": max(extent_x, extent_u) + shape.c_out >= 2**31,
    }
    constexprs |= {name: value for name, value in vars(config).items() if name.isupper()}
    trips: tuple[int, ...] = ()
    if isinstance(config, DepthwiseConfig):
        kernel = branch_conv_depthwise_fwd_kernel
    else:
        constexprs |= {
            "SPANS": layout.spans,
            "CHANNELS_CI": layout.channels_ci,
            "CHANNELS_CO": layout.channels_co,
            "BLOCK_POOL": BLOCK_POOL,
            # Pooling on the tensor core multiplies by 0 or 1: a NaN would reach the other samples of its tile, and
            # fp32 sums would be rounded to TF32.
            "POOL_BY_DOT": config.BLOCK_N == 1 and x.element_size() == 2,
            "HAS_CHANNEL_MASK": not _is_full(shape, layout, config),
            "PRECISION": "tf32" if allow_tf32 else "ieee",
            "IS_EVEN_W": tuple(w_out % (config.RUN_W * spacing) == 0 for spacing in layout.spacings),
        }
        if isinstance(config, StreamConfig):
            constexprs["IS_EVEN_H"] = tuple(h % (config.RUN_H * spacing) == 0 for spacing in layout.spacings)
            kernel = branch_conv_stream_fwd_kernel
            trips = (config.BLOCKS_PER_PROGRAM,)
        else:
            constexprs |= {"BLOCKS_PER_GROUP": layout.blocks_per_group, "K_CHUNKS": layout.chunks}
            kernel = branch_conv_tap_fwd_kernel
            trips = tuple(k * t * layout.chunks for k, t in zip(shape.kernels, layout.taps_w, strict=True))
    return Launch(
        kernel,
        (cdiv(n, config.BLOCK_N) * tiles_h * tiles_w * programs,),
        arguments,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        trips,
    )


def _is_full(shape: ConvShape, layout: Blocking, config: StreamConfig | TapConfig) -> bool:
    """Whether every channel block is full, so that channels need no mask."""
    return (
        layout.channels_ci == layout.chunks * config.BLOCK_CI
        and layout.channels_co == layout.blocks_per_group * config.BLOCK_CO
        and layout.blocks * layout.groups_per_block == layout.blocks_per_group * shape.groups
    )
