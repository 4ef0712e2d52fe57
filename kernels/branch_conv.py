"""Launchers of the branch convolutions: the config's type names the kernel."""

from itertools import chain
from typing import Any

import torch
import triton

from .branch_conv_column import branch_conv_column_fwd_kernel
from .branch_conv_depthwise import branch_conv_depthwise_fwd_kernel
from .branch_conv_held import branch_conv_held_fwd_kernel
from .branch_conv_stream import branch_conv_stream_fwd_kernel
from .branch_conv_tap import branch_conv_tap_fwd_kernel
from .branch_conv_window import branch_conv_window_fwd_kernel
from .config import (
    BranchConfig,
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from .geometry import (
    Blocking,
    ConvShape,
    blocking,
    blocks_per_program,
    can_run,
    cdiv,
    column_runs,
    is_crossed,
    is_full,
    is_whole_height,
    known_stride,
    lattice,
    reach,
    tiles,
)
from .launch import Launch
from .prefetch import can_prefetch
from .window_geometry import branch_points, partners, places

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

    `x [N, C, H_in, W_in]`, channels adjacent in memory (stride 1), other strides free; `w` from `branch_weight_launch`;
    `shift [M, C_out]` fp32; `u [M, N, H, W, C_out]`, channels adjacent; `partial [N, tiles, C_out]` fp32, receives the
    sums over branches and each tile's pixels (`tiles` as `geometry.tiles`). Results are rounded to the dtype of `u`.
    """
    return _launch("store", x, w, shift, None, u, partial, u.shape[2:4], shape, has_relu, allow_tf32, config)


def branch_train_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    y: torch.Tensor,
    moments: torch.Tensor,
    *,
    shape: ConvShape,
    allow_tf32: bool,
    config: BranchConfig,
) -> Launch:
    """The convolutions themselves, `y[m] = conv_m(x) + shift[m]`, and the moments of their tiles over the batch.

    `y [M, N, H, W, C_out]`, channels adjacent; `moments [M, 3, tiles, C_out]` fp32 receives number, mean and centred
    second moment of each tile's rounded values, with `cdiv(N, BLOCK_N) * TILES_H * TILES_W` tiles; the rest as
    `branch_conv_fwd`.

    Raises:
        ValueError: a config whose kernel takes no moments.
    """
    if isinstance(config, DepthwiseConfig):
        raise ValueError(f"config must not be a DepthwiseConfig to train, got {config}")
    return _launch("train", x, w, shift, None, y, moments[0], y.shape[2:4], shape, False, allow_tf32, config)


def branch_measure_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    moments: torch.Tensor,
    *,
    shape: ConvShape,
    allow_tf32: bool,
    config: BranchConfig,
) -> Launch:
    """The moments of `branch_train_fwd` alone, bit for bit; the convolutions are not written.

    Raises:
        ValueError: a config whose kernel only stores.
    """
    size = shape.output_size(*x.shape[2:])
    return _launch("measure", x, w, shift, None, None, moments[0], size, shape, False, allow_tf32, config)


def branch_pool_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    partial: torch.Tensor,
    *,
    shape: ConvShape,
    has_relu: bool,
    allow_tf32: bool,
    config: BranchConfig,
) -> Launch:
    """The pooled sums of `branch_conv_fwd` alone; the branches are not written.

    Raises:
        ValueError: a config whose kernel only stores.
    """
    h, w_out = shape.output_size(*x.shape[2:])
    return _launch("pool", x, w, shift, None, None, partial, (h, w_out), shape, has_relu, allow_tf32, config)


def branch_select_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    attention: torch.Tensor,
    v: torch.Tensor,
    *,
    shape: ConvShape,
    has_relu: bool,
    allow_tf32: bool,
    config: BranchConfig,
) -> Launch:
    """The branches convolved and selected at once: `v = sum over m of attention[:, m] * act(conv_m(x) + shift[m])`.

    `attention [N, M, C_out]` fp32, contiguous; `v [N, C_out, H, W]` of any strides; the rest as `branch_conv_fwd`.

    Raises:
        ValueError: a config whose kernel only stores, or whose tiles do not cover the same pixels in every branch.
    """
    return _launch(
        "select", x, w, shift, attention, v, None, v.shape[2:], shape, has_relu, allow_tf32, config
    )


def _launch(
    task: str,
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    attention: torch.Tensor | None,
    out: torch.Tensor | None,
    partial: torch.Tensor | None,
    size: tuple[int, int] | torch.Size,
    shape: ConvShape,
    has_relu: bool,
    allow_tf32: bool,
    config: BranchConfig,
) -> Launch:
    n, _, h_in, w_in = x.shape
    h, w_out = size
    is_select = task == "select"
    layout = blocking(shape, config)
    tiles_h, tiles_w = tiles(shape, config, h, w_out, is_common=is_select)
    programs = layout.blocks // blocks_per_program(config)
    count = cdiv(n, config.BLOCK_N) * tiles_h * tiles_w
    grid = count * programs
    if is_select:
        assert out is not None
        out_strides = (0, *out.stride())  # m, n, c, h, w
    elif out is not None:
        out_strides = (out.stride(0), out.stride(1), out.stride(4), out.stride(2), out.stride(3))
    else:
        out_strides = (0, 0, 1, 0, 0)
    _, stride_on, stride_oc, stride_oh, stride_ow = out_strides
    extent_x = (config.BLOCK_N - 1) * x.stride(0) + (h_in - 1) * x.stride(2) + (w_in - 1) * x.stride(3)
    extent_out = (config.BLOCK_N - 1) * stride_on + (h - 1) * stride_oh + (w_out - 1) * stride_ow
    extent = max(extent_x + shape.c_in, extent_out + shape.c_out * stride_oc)
    constexprs = shared_constexprs(x, shape, shift is not None, has_relu, allow_tf32, config, extent)
    sizes = (n, h_in, w_in, h, w_out)
    unused = x  # stands for a pointer that the task does not follow
    tensors = (x, w, unused if shift is None else shift)
    outputs = (unused if out is None else out, unused if partial is None else partial)
    partial_strides = (0, 0) if partial is None else (partial.stride(0), partial.stride(1))
    trips: tuple[int, ...]
    if isinstance(config, WindowConfig):
        if not can_run(task, shape, config) or x.element_size() != 2:
            raise ValueError(
                f"config: a window of rows takes 16-bit inputs, stride 1 and branches of the same channels, by sparse "
                f"products 8 lanes of groups of 1, 2, 4 or 8; got {x.dtype}, {shape} and {config}"
            )
        points = branch_points(shape)
        constexprs = {
            name: value
            for name, value in constexprs.items()
            if name in branch_conv_window_fwd_kernel.arg_names
        }
        constexprs |= {
            "TASK": task,
            "REACH": reach(shape),
            "IS_EVEN_H": h % config.RUN_H == 0,
            "IS_EVEN_W": w_out % config.RUN_W == 0,
            "STRIDE_XW": known_stride(x.stride(3), shape.c_in, extent),
            "STRIDE_OW": known_stride(stride_ow, shape.c_out, extent),
            "BLOCKS": config.num_warps,
            "PREFETCH": config.PREFETCH and can_prefetch(x),
            "IS_CROSSED": is_crossed(shape, config),
            "PLACES": places(list(chain(*points)), shape, config.RUN_W),
            "PARTNERS": tuple(chain(*(partners(own, shape) for own in points))),
        }
    if isinstance(config, StreamConfig | WindowConfig | ColumnConfig):
        arguments: tuple[Any, ...] = (
            *tensors, unused if attention is None else attention, *outputs,
            *sizes, shape.c_in, shape.c_out, tiles_h, tiles_w, programs,
            x.stride(0), x.stride(2), x.stride(3), *out_strides, *partial_strides,
        )  # fmt: skip
    if isinstance(config, WindowConfig):
        kernel, trips = branch_conv_window_fwd_kernel, (config.RUN_H,)
    elif isinstance(config, StreamConfig | ColumnConfig):
        constexprs |= {"TASK": task, **task_constexprs(task, shape, config, h, w_out)}
        if isinstance(config, StreamConfig):
            if not can_run(task, shape, config):
                raise ValueError(
                    f"config: BLOCK_W must be a multiple of every branch's spacing, a power of two, to select; got "
                    f"BLOCK_W {config.BLOCK_W} and spacings {layout.spacings}"
                )
            kernel, trips = branch_conv_stream_fwd_kernel, (config.BLOCKS_PER_PROGRAM,)
        elif isinstance(config, HeldConfig):
            if not can_run(task, shape, config):
                raise ValueError(f"config must not be a HeldConfig to select, got {config}")
            kernel = branch_conv_held_fwd_kernel
            walked = min(count, config.TILES_PER_PROGRAM)
            left = [1 if config.UNROLL else max(1, k - config.HELD_COLUMNS) for k in shape.kernels]
            trips = tuple(trip for own in left for trip in (walked, own))
            grid = cdiv(count, config.TILES_PER_PROGRAM) * programs
            arguments = (
                *tensors, *outputs, *sizes, shape.c_in, shape.c_out, count, tiles_h, tiles_w, programs,
                x.stride(0), x.stride(2), x.stride(3), *out_strides, *partial_strides,
            )  # fmt: skip
        else:
            kernel = branch_conv_column_fwd_kernel
            trips = () if config.UNROLL else shape.kernels
    else:
        if task not in ("store", "train"):
            raise ValueError(
                f"config must be a StreamConfig, WindowConfig or ColumnConfig to {task}, got {config}"
            )
        constexprs["SPACINGS"] = layout.spacings
        channels: tuple[int, ...]
        if isinstance(config, DepthwiseConfig):
            kernel, trips, channels = branch_conv_depthwise_fwd_kernel, (), (shape.c_out,)
        else:
            constexprs |= {
                "TASK": task,
                "SPANS": layout.spans,
                "IS_EVEN_W": _even_rows(layout, config, w_out),
                "BLOCKS_PER_GROUP": layout.blocks_per_group,
                "K_CHUNKS": layout.chunks,
            }
            kernel, channels = branch_conv_tap_fwd_kernel, (shape.c_in, shape.c_out)
            trips = tuple(k * t * layout.chunks for k, t in zip(shape.kernels, layout.taps_w, strict=True))
        arguments = (
            *tensors, *outputs, *sizes, *channels, tiles_h, tiles_w, programs,
            x.stride(0), x.stride(2), x.stride(3), out_strides[0], stride_on, stride_oh, stride_ow, *partial_strides,
        )  # fmt: skip
    return Launch(
        kernel,
        (grid,),
        arguments,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        trips,
    )


def shared_constexprs(
    x: torch.Tensor,
    shape: ConvShape,
    has_shift: bool,
    has_relu: bool,
    allow_tf32: bool,
    config: BranchConfig,
    extent: int,
) -> dict[str, Any]:
    """Constexprs of a branch kernel that do not depend on its task; a tile's samples reach over `extent` elements."""
    layout = blocking(shape, config)
    constexprs: dict[str, Any] = {
        "KERNELS": shape.kernels,
        "DILATIONS": lattice(shape),
        "W_OFFSETS": layout.offsets,
        "STRIDE": shape.stride,
        "SPLIT_CI": shape.c_in if shape.is_split else 0,
        "HAS_SHIFT": has_shift,
        "HAS_RELU": has_relu,
        "IS_LARGE": extent >= 2**31,
    }
    constexprs |= {name: value for name, value in vars(config).items() if name.isupper()}
    if not isinstance(config, DepthwiseConfig):
        constexprs |= {
            "CHANNELS_CI": layout.channels_ci,
            "CHANNELS_CO": layout.channels_co,
            "BLOCK_POOL": BLOCK_POOL,
            # Pooling on the tensor core multiplies by 0 or 1: a NaN would reach the other samples of its tile, and
            # fp32 sums would be rounded to TF32.
            "POOL_BY_DOT": config.BLOCK_N == 1 and x.element_size() == 2,
            "HAS_CHANNEL_MASK": not is_full(shape, config),
            "PRECISION": "tf32" if allow_tf32 else "ieee",
        }
    return constexprs


def task_constexprs(
    task: str, shape: ConvShape, config: StreamConfig | ColumnConfig, h: int, w: int
) -> dict[str, Any]:
    """Constexprs of the stream or column kernel that depend on its task and on the size of the output."""
    layout = blocking(shape, config)
    columns = column_runs(shape, config, task == "select")
    even = tuple(h % (config.RUN_H * spacing) == 0 for spacing in columns.spacings)
    constexprs: dict[str, Any] = {
        "PITCHES": columns.pitches,
        "STEPS_R": columns.steps_r,
        "STEPS_K": columns.steps_k,
    }
    if isinstance(config, ColumnConfig):
        return {
            **constexprs,
            "IS_EVEN_H": even[0],
            "IS_WHOLE_H": is_whole_height(shape, config, h),
            "BLOCKS_PER_GROUP": layout.blocks_per_group,
        }
    return {
        **constexprs,
        "SPACINGS_H": columns.spacings,
        "SPACINGS_W": layout.spacings,
        "SPANS": layout.spans,
        "IS_EVEN_H": even,
        "IS_EVEN_W": _even_rows(layout, config, w),
    }


def _even_rows(layout: Blocking, config: StreamConfig | TapConfig, w: int) -> tuple[bool, ...]:
    return tuple(w % (config.RUN_W * spacing) == 0 for spacing in layout.spacings)
