"""One convolution in place of all branches, where they are linear: its weights are built in the launch, per sample.

`v = conv(x, sum_m a_m W_m) + sum_m a_m b_m`: a program builds the weights of one sample and channel block, rounds them
once to x's dtype, keeps them in registers and convolves its share of the sample's tiles with them. The formulation is
that of `branch_conv_stream`, less the pooling. Derivation and counts: `kernels/README.md`.
"""

import torch
import triton
import triton.language as tl

from .config import MergedConfig
from .geometry import ConvShape, blocking, cdiv, tiles
from .launch import Launch
from .merging import row_parts
from .tiling import as_operand, part_elements, run_origin, widen


@triton.jit
def read_part(
    x_ptr, y, x, mask_p, CI_END, H_IN, W_IN, stride_xh, stride_xw,
    DY: tl.constexpr, DX: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_PIXEL_MASK: tl.constexpr, HAS_ROW_MASK: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
):  # fmt: skip
    """The part of an input row that starts DX pixels right of each run, as a right operand. [BLOCK_K, BLOCK_P]

    `x_ptr` points at the row DY below the runs' first: a uniform offset, one scalar for all elements.
    """
    IS_SHORT: tl.constexpr = BLOCK_K == 16 and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    point, ci = part_elements(BLOCK_CI, BLOCK_K, IS_SHORT)
    x_in = x[:, None] * STRIDE + point[None, :] * PITCH + DX
    mask = (x_in >= 0) & (x_in < W_IN)
    if HAS_PIXEL_MASK:
        mask &= mask_p[:, None]
    if HAS_ROW_MASK:
        y_in = y * STRIDE + DY
        mask &= ((y_in >= 0) & (y_in < H_IN))[:, None]
    if HAS_CHANNEL_MASK:
        mask &= (ci < CI_END)[None, :]
    offs_x = (y * STRIDE * stride_xh)[:, None] + x_in * stride_xw + ci[None, :]
    return as_operand(tl.load(x_ptr + offs_x, mask=mask, other=0.0), IS_SHORT)


@triton.jit
def merged_weight(
    w_ptr, gains, offs_m, stride_wm, START: tl.constexpr,
    SPAN: tl.constexpr, RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`sum_m gains[m] * w[m]` of one kernel row and part, in fp32, rounded once. [RUN_W * BLOCK_CO, BLOCK_K]"""
    IS_SHORT: tl.constexpr = BLOCK_K == 16 and w_ptr.dtype.element_ty.primitive_bitwidth == 16
    point, ci = part_elements(BLOCK_CI, BLOCK_K, IS_SHORT)
    if RUN_W > 1:
        offs_w = offs_m[:, None] * (SPAN * BLOCK_CI) + ((START + point) * BLOCK_CI)[None, :] + ci[None, :]
    else:
        offs_w = (
            ((START + point) * (offs_m.shape[0] * BLOCK_CI))[None, :]
            + (offs_m * BLOCK_CI)[:, None]
            + ci[None, :]
        )
    merged = gains[0][:, None] * tl.load(w_ptr + offs_w).to(tl.float32)
    for m in tl.static_range(1, len(gains)):
        merged += gains[m][:, None] * tl.load(w_ptr + m * stride_wm + offs_w).to(tl.float32)
    return as_operand(merged.to(w_ptr.dtype.element_ty), IS_SHORT)


@triton.jit
def merged_weights(
    w_ptr, scale_ptr, shift_ptr, attention_ptr, offs_m, co, mask_co, C_OUT,
    M: tl.constexpr, KERNEL: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, W_BRANCH: tl.constexpr,
    RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """A sample's weights, `[RUN_W * BLOCK_CO, part]` for each kernel row and part, and its shift, one per row."""
    gains = ()
    shift = tl.zeros([offs_m.shape[0]], tl.float32)
    for m in tl.static_range(M):
        a = tl.load(attention_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        if HAS_SHIFT:
            shift += a * tl.load(shift_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        if HAS_SCALE:
            a *= tl.load(scale_ptr + m * C_OUT + co, mask=mask_co, other=0.0)
        gains = gains + (a,)
    weights = ()
    for ky in tl.static_range(KERNEL):
        for part in tl.static_range(len(PARTS) - 1):
            weight = merged_weight(
                w_ptr + ky * (W_BRANCH // KERNEL), gains, offs_m, W_BRANCH, PARTS[part],
                SPAN, RUN_W, BLOCK_CI, (PARTS[part + 1] - PARTS[part]) * BLOCK_CI,
            )  # fmt: skip
            weights = weights + (weight,)
    return weights, shift


@triton.jit(
    do_not_specialize=("H_IN", "W_IN", "H", "W", "TILES", "TILES_W", "TILES_PER_PROGRAM", "SPLITS", "BLOCKS")
)
def merged_conv_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, attention_ptr, v_ptr,
    H_IN, W_IN, H, W, C_IN, C_OUT, TILES, TILES_W, TILES_PER_PROGRAM, SPLITS, BLOCKS,
    stride_xn, stride_xh, stride_xw, stride_vn, stride_vc, stride_vh, stride_vw,
    M: tl.constexpr, KERNEL: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr, SPACING: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, W_BRANCH: tl.constexpr,
    IS_EVEN_H: tl.constexpr, HAS_PIXEL_MASK: tl.constexpr, CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One sample's outputs of one channel block, in TILES_PER_PROGRAM tiles.

    A tile is BLOCK_H column runs (RUN_H outputs each) x BLOCK_W row runs (RUN_W outputs each). A channel block is
    CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK_CI and BLOCK_CO. An input row is read in
    parts: from lattice point PARTS[i] of a run on, WIDTHS[i] points.
    """
    BLOCK_P: tl.constexpr = BLOCK_H * BLOCK_W
    BLOCK_M: tl.constexpr = RUN_W * BLOCK_CO
    HALF: tl.constexpr = KERNEL // 2
    STEP: tl.constexpr = SPACING * STRIDE // PITCH
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    stride_vc, stride_vh, stride_vw = widen(stride_vc, stride_vh, stride_vw, IS_LARGE)
    pid = tl.program_id(0)
    block = pid % BLOCKS
    first = pid // BLOCKS % SPLITS * TILES_PER_PROGRAM
    n = (pid // BLOCKS // SPLITS).to(tl.int64)
    ci0 = block * CHANNELS_CI
    co0 = block * CHANNELS_CO
    ci_end = tl.minimum(CHANNELS_CI, C_IN - ci0)
    co_end = tl.minimum(CHANNELS_CO, C_OUT - co0)
    x_ptr += n * stride_xn + ci0
    v_ptr += n * stride_vn + co0 * stride_vc
    offs_p = tl.arange(0, BLOCK_P)
    offs_m = tl.arange(0, BLOCK_M)
    co = offs_m % BLOCK_CO
    mask_co = co < co_end

    weights, shift = merged_weights(
        w_ptr + block * (M * W_BRANCH), scale_ptr + co0, shift_ptr + co0, attention_ptr + n * (M * C_OUT) + co0,
        offs_m, co, mask_co, C_OUT,
        M, KERNEL, SPAN, PARTS, W_BRANCH, RUN_W, BLOCK_CI, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip

    for tile in range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES)):
        y = run_origin(tile // TILES_W * BLOCK_H + offs_p // BLOCK_W, RUN_H, SPACING)
        x = run_origin(tile % TILES_W * BLOCK_W + offs_p % BLOCK_W, RUN_W, SPACING)
        mask_p = (y < H) & (x < W)
        rows = ()
        for i in tl.static_range((RUN_H - 1) * STEP + KERNEL):
            for part in tl.static_range(len(PARTS) - 1):
                row = read_part(
                    x_ptr + (i - HALF) * PITCH * stride_xh, y, x, mask_p, ci_end, H_IN, W_IN, stride_xh, stride_xw,
                    (i - HALF) * PITCH, (PARTS[part] - HALF) * PITCH, PITCH, STRIDE,
                    BLOCK_CI, (PARTS[part + 1] - PARTS[part]) * BLOCK_CI,
                    HAS_PIXEL_MASK, not (IS_EVEN_H and i >= HALF and i <= HALF + (RUN_H - 1) * STEP), HAS_CHANNEL_MASK,
                )  # fmt: skip
                rows = rows + (row,)

        x_out = x[None, :] + (offs_m // BLOCK_CO)[:, None] * SPACING  # [BLOCK_M, BLOCK_P]
        offs_v = (y * stride_vh)[None, :] + x_out * stride_vw + (co * stride_vc)[:, None]
        mask_out = (offs_m >= 0)[:, None] & (offs_p >= 0)[None, :]
        if HAS_PIXEL_MASK:
            mask_out = mask_p[None, :] & (x_out < W)
        if HAS_CHANNEL_MASK:
            mask_out &= mask_co[:, None]
        for r in tl.static_range(RUN_H):
            acc = tl.broadcast_to(shift[:, None], [BLOCK_M, BLOCK_P])
            for k in tl.static_range(KERNEL * (len(PARTS) - 1)):
                row = rows[r * STEP * (len(PARTS) - 1) + k]
                acc = tl.dot(weights[k], tl.trans(row), acc, input_precision=PRECISION)
            mask_r = mask_out
            if not IS_EVEN_H:
                mask_r = mask_out & (y + r * SPACING < H)[None, :]
            tl.store(v_ptr + r * SPACING * stride_vh + offs_v, acc.to(v_ptr.dtype.element_ty), mask=mask_r)


def merged_conv_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    attention: torch.Tensor,
    v: torch.Tensor,
    *,
    shape: ConvShape,
    allow_tf32: bool,
    config: MergedConfig,
) -> Launch:
    """Write `v [N, C_out, H, W]`, the sum over m of `attention[:, m] * (scale[m] * conv_m(x) + shift[m])`.

    `x [N, C_in, H_in, W_in]`, channels adjacent in memory (stride 1), other strides free; strides of `v` are free. `w`
    from `pack_branch_weights` for `shape`, whose branches share kernel and dilation (`merging.merged_shape`); `scale`
    and `shift [M, C_out]`, `attention [N, M, C_out]` fp32, contiguous. The merged weights are rounded to x's dtype.
    """
    n, _, h_in, w_in = x.shape
    _, _, h, w_out = v.shape
    m, kernel = len(shape.kernels), shape.kernels[0]
    layout = blocking(shape, config)
    pitch, spacing = layout.spacings[0] * shape.stride // layout.steps[0], layout.spacings[0]
    tiles_h, tiles_w = tiles(shape, config, h, w_out)
    covered = tiles_h * config.BLOCK_H * config.RUN_H * tiles_w * config.BLOCK_W * config.RUN_W
    per_program = min(config.TILES_PER_PROGRAM, tiles_h * tiles_w)
    splits = cdiv(tiles_h * tiles_w, per_program)
    extent_x = (h_in - 1) * x.stride(2) + (w_in - 1) * x.stride(3) + shape.c_in
    extent_v = (h - 1) * v.stride(2) + (w_out - 1) * v.stride(3) + (shape.c_out - 1) * v.stride(1)
    arguments = (
        x, w, w if scale is None else scale, w if shift is None else shift, attention, v,
        h_in, w_in, h, w_out, shape.c_in, shape.c_out, tiles_h * tiles_w, tiles_w, per_program, splits, layout.blocks,
        x.stride(0), x.stride(2), x.stride(3), v.stride(0), v.stride(1), v.stride(2), v.stride(3),
    )  # fmt: skip
    constexprs = {
        "M": m,
        "KERNEL": kernel,
        "PITCH": pitch,
        "STRIDE": shape.stride,
        "SPACING": spacing,
        "SPAN": layout.spans[0],
        "W_BRANCH": layout.offsets[1],
        "PARTS": row_parts(shape, config, x.dtype),
        "IS_EVEN_H": h % (config.RUN_H * spacing) == 0,
        "HAS_PIXEL_MASK": covered != h * w_out,
        "CHANNELS_CI": layout.channels_ci,
        "CHANNELS_CO": layout.channels_co,
        "BLOCK_CI": config.BLOCK_CI,
        "BLOCK_CO": config.BLOCK_CO,
        "BLOCK_H": config.BLOCK_H,
        "BLOCK_W": config.BLOCK_W,
        "RUN_H": config.RUN_H,
        "RUN_W": config.RUN_W,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "HAS_CHANNEL_MASK": layout.channels_ci != config.BLOCK_CI
        or layout.channels_co != config.BLOCK_CO
        or layout.blocks * layout.groups_per_block != shape.groups,
        "IS_LARGE": max(extent_x, extent_v) >= 2**31,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
    }
    return Launch(
        merged_conv_fwd_kernel,
        (n * splits * layout.blocks,),
        arguments,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": 1},
        (per_program,),
    )
