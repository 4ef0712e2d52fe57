"""Launchers of the branch convolutions: the config's type names the kernel."""

from collections.abc import Callable
from typing import Any

import torch

from .branch_call import BranchCall
from .branch_conv_column import branch_conv_column_fwd
from .branch_conv_depthwise import branch_conv_depthwise_fwd
from .branch_conv_held import branch_conv_held_fwd
from .branch_conv_stream import branch_conv_stream_fwd
from .branch_conv_tap import branch_conv_tap_fwd
from .branch_conv_window import branch_conv_window_fwd
from .config import (
    BranchConfig,
    ColumnConfig,
    DepthwiseConfig,
    HeldConfig,
    StreamConfig,
    TapConfig,
    WindowConfig,
)
from .geometry import ConvShape, branch_refusal
from .launch import Launch

LAUNCHERS: dict[type, Callable[[BranchCall[Any]], Launch]] = {
    StreamConfig: branch_conv_stream_fwd,
    WindowConfig: branch_conv_window_fwd,
    ColumnConfig: branch_conv_column_fwd,
    HeldConfig: branch_conv_held_fwd,
    TapConfig: branch_conv_tap_fwd,
    DepthwiseConfig: branch_conv_depthwise_fwd,
}


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

    Raises:
        ValueError: a config whose kernel does not do this (`geometry.branch_refusal`), or an output of another size.
    """
    return _launch(
        BranchCall("store", x, w, shift, shape, config, has_relu, allow_tf32, out=u, partial=partial)
    )


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
        ValueError: a config whose kernel does not do this (`geometry.branch_refusal`), or an output of another size.
    """
    return _launch(
        BranchCall("train", x, w, shift, shape, config, False, allow_tf32, out=y, partial=moments[0])
    )


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
        ValueError: a config whose kernel does not do this (`geometry.branch_refusal`).
    """
    return _launch(BranchCall("measure", x, w, shift, shape, config, False, allow_tf32, partial=moments[0]))


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
        ValueError: a config whose kernel does not do this (`geometry.branch_refusal`).
    """
    return _launch(BranchCall("pool", x, w, shift, shape, config, has_relu, allow_tf32, partial=partial))


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
        ValueError: a config whose kernel does not do this (`geometry.branch_refusal`), or an output of another size.
    """
    return _launch(
        BranchCall("select", x, w, shift, shape, config, has_relu, allow_tf32, attention=attention, out=v)
    )


def _launch(call: BranchCall[BranchConfig]) -> Launch:
    if reason := branch_refusal(call.task, call.shape, call.config, call.x.element_size()):
        raise ValueError(f"config: {reason}")
    if call.out is not None and (size := call.out_size) != call.output_size:
        name = {"store": "u", "train": "y", "select": "v"}[call.task]
        raise ValueError(
            f"{name} must have {call.output_size} pixels for an x of {tuple(call.x.shape)}, got {size}"
        )
    return LAUNCHERS[type(call.config)](call)
