"""One convolution in place of all branches, where they are linear: its weights are built in the launch, per sample.

`v = conv(x, sum_m a_m W_m) + sum_m a_m b_m`: a program builds the weights of one sample and channel block, rounds them
once to x's dtype, keeps them in registers and convolves its share of the sample's tiles with them. The formulation is
that of `branch_conv_stream`, less the pooling. Derivation and counts: `kernels/README.md`.
"""

import torch
import triton
import triton.language as tl

from .config import MergedConfig, WindowConfig
from .geometry import ConvShape, blocking, cdiv, is_full, is_whole_height, needs_64_bits, tiles
from .launch import Launch
from .merged_conv_window import branch_gains, merged_conv_window_fwd
from .merging import branch_blocks, merged_shape, row_parts
from .tiling import part_elements, right_operand, run_origin, widen

# Input rows in flight beyond those that the current output needs.
ROWS_AHEAD = tl.constexpr(2)


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
    return right_operand(tl.load(x_ptr + offs_x, mask=mask, other=0.0), IS_SHORT)


@triton.jit
def load_right_operand(w_ptr, BLOCK_K: tl.constexpr):
    """A block of a branch's weights `[16, BLOCK_K]`, its columns in the order of `right_operand`'s rows, as
    `weight_orders.merging_order` stores it: each thread reads what it holds of the right operand at once.
    """
    flat = tl.load(w_ptr + tl.arange(0, 16 * BLOCK_K))
    flat = tl.reshape(flat, [BLOCK_K // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(flat, (4, 2, 5, 0, 3, 1)), [16, BLOCK_K])


@triton.jit
def on_diagonal(values):
    """A square matrix with `values` on its diagonal, and zeros."""
    offs = tl.arange(0, values.shape[0])
    return tl.where(offs[:, None] == offs[None, :], values[:, None], 0.0).to(values.dtype)


@triton.jit
def multiplied_weight(
    w_ptr, gains, offs_m, stride_wm, START: tl.constexpr, HAS_TAPS: tl.constexpr, FIRST: tl.constexpr,
    SPAN: tl.constexpr, RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`sum_m gains[m] * w[m]` of one kernel row and part in fp32, by multiply-adds. [RUN_W * BLOCK_CO, BLOCK_K]

    HAS_TAPS[FIRST + m] says whether branch m has taps there.
    """
    point, ci = part_elements(BLOCK_CI, BLOCK_K, False)
    if RUN_W > 1:
        offs_w = offs_m[:, None] * (SPAN * BLOCK_CI) + ((START + point) * BLOCK_CI)[None, :] + ci[None, :]
    else:
        offs_w = (
            ((START + point) * (offs_m.shape[0] * BLOCK_CI))[None, :]
            + (offs_m * BLOCK_CI)[:, None]
            + ci[None, :]
        )
    merged = tl.zeros([offs_m.shape[0], BLOCK_K], tl.float32)
    for m in tl.static_range(len(gains)):
        if HAS_TAPS[FIRST + m]:
            merged += gains[m][:, None] * tl.load(w_ptr + m * stride_wm + offs_w)
    # As `right_operand`, but on the left: its columns in the same order, by one permutation for the same reason.
    merged = tl.permute(tl.reshape(merged, [offs_m.shape[0], 4, 2, 2]), [0, 2, 3, 1])
    return tl.reshape(merged, [offs_m.shape[0], BLOCK_K])


@triton.jit
def diagonal_weight(
    w_ptr, gains, stride_wm, HAS_TAPS: tl.constexpr, FIRST: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The same of 16-bit weights, by products with diagonal matrices, rounded once. [RUN_W * BLOCK_CO, BLOCK_K]

    `gains[m]` is a pair of such matrices in the weights' dtype, which add up to the branch's gains. Both operands of a
    product are exact, and its sum has the layout of a left operand.
    """
    BLOCK_M: tl.constexpr = gains[0][0].shape[0]
    merged = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for m in tl.static_range(len(gains)):
        if HAS_TAPS[FIRST + m]:
            w = load_right_operand(w_ptr + m * stride_wm, BLOCK_K)
            merged = tl.dot(gains[m][0], w, merged)
            merged = tl.dot(gains[m][1], w, merged)
    return merged.to(w_ptr.dtype.element_ty)


@triton.jit
def merged_weights(
    w_ptr, scale_ptr, shift_ptr, attention_ptr, offs_m, co, mask_co, C_OUT,
    M: tl.constexpr, KERNEL: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, HAS_TAPS: tl.constexpr,
    W_BRANCH: tl.constexpr, RUN_W: tl.constexpr, BLOCK_CI: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """A sample's weights, `[RUN_W * BLOCK_CO, part]` for each kernel row and part; what they are relative to, 1 unless
    16-bit weights meet a norm's scale, and the outputs' shift, one per row.
    """
    dtype = w_ptr.dtype.element_ty
    BLOCK_M: tl.constexpr = offs_m.shape[0]
    gains, factor, shift = branch_gains(
        scale_ptr, shift_ptr, attention_ptr, co, mask_co, C_OUT, M, HAS_SCALE, HAS_SHIFT
    )
    weights = ()
    if dtype == tl.float32:
        factor = tl.full([BLOCK_M], 1.0, tl.float32)
        for ky in tl.static_range(KERNEL):
            for part in tl.static_range(len(PARTS) - 1):
                weight = multiplied_weight(
                    w_ptr + ky * (W_BRANCH // KERNEL), gains, offs_m, W_BRANCH, PARTS[part],
                    HAS_TAPS, (ky * (len(PARTS) - 1) + part) * M,
                    SPAN, RUN_W, BLOCK_CI, (PARTS[part + 1] - PARTS[part]) * BLOCK_CI,
                )  # fmt: skip
                weights = weights + (weight,)
    else:
        diagonals = ()
        for m in tl.static_range(M):
            # In 16 bits a norm's scale might overflow or lose its digits: gains are taken relative to the largest.
            gain = gains[m] / factor if HAS_SCALE else gains[m]
            high = gain.to(dtype)
            low = (gain - high.to(tl.float32)).to(dtype)
            diagonals = diagonals + ((on_diagonal(high), on_diagonal(low)),)
        for ky in tl.static_range(KERNEL):
            for part in tl.static_range(len(PARTS) - 1):
                weight = diagonal_weight(
                    w_ptr + ky * (W_BRANCH // KERNEL) + PARTS[part] * (BLOCK_M * BLOCK_CI), diagonals, W_BRANCH,
                    HAS_TAPS, (ky * (len(PARTS) - 1) + part) * M, (PARTS[part + 1] - PARTS[part]) * BLOCK_CI,
                )  # fmt: skip
                weights = weights + (weight,)
    return weights, factor, shift


@triton.jit(
    do_not_specialize=("H_IN", "W_IN", "H", "W", "TILES", "TILES_W", "TILES_PER_PROGRAM", "SPLITS", "BLOCKS")
)
def merged_conv_fwd_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, attention_ptr, v_ptr,
    H_IN, W_IN, H, W, C_IN, C_OUT, TILES, TILES_W, TILES_PER_PROGRAM, SPLITS, BLOCKS,
    stride_xn, stride_xh, stride_xw, stride_vn, stride_vc, stride_vh, stride_vw,
    M: tl.constexpr, KERNEL: tl.constexpr, PITCH: tl.constexpr, STRIDE: tl.constexpr, SPACING: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, HAS_TAPS: tl.constexpr, W_BRANCH: tl.constexpr,
    IS_EVEN_H: tl.constexpr, IS_WHOLE_H: tl.constexpr, HAS_PIXEL_MASK: tl.constexpr,
    CHANNELS_CI: tl.constexpr, CHANNELS_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    RUN_H: tl.constexpr, RUN_W: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr, IS_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One sample's outputs of one channel block, in TILES_PER_PROGRAM tiles.

    A tile is BLOCK_H column runs (RUN_H outputs each) x BLOCK_W row runs (RUN_W outputs each). A channel block is
    CHANNELS_CI inputs and CHANNELS_CO outputs (whole groups), padded to BLOCK_CI and BLOCK_CO. An input row is read in
    parts: from lattice point PARTS[i] of a run up to PARTS[i + 1]. HAS_TAPS says of each kernel row, part and
    branch whether there are taps.
    """
    BLOCK_P: tl.constexpr = BLOCK_H * BLOCK_W
    BLOCK_M: tl.constexpr = RUN_W * BLOCK_CO
    HALF: tl.constexpr = KERNEL // 2
    STEP: tl.constexpr = SPACING * STRIDE // PITCH
    # Row i is (i - HALF) * PITCH input pixels below a run's first; a run as high as the image needs its own rows alone.
    LAST_OWN: tl.constexpr = HALF + (RUN_H - 1) * STEP
    START: tl.constexpr = HALF if IS_WHOLE_H else 0
    STOP: tl.constexpr = LAST_OWN + 1 if IS_WHOLE_H else LAST_OWN + HALF + 1
    # In 16 bits the weights are relative to a channel's largest gain, where norms scale them.
    IS_RELATIVE: tl.constexpr = HAS_SCALE and x_ptr.dtype.element_ty.primitive_bitwidth == 16
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

    weights, factor, shift = merged_weights(
        w_ptr + block * (M * W_BRANCH), scale_ptr + co0, shift_ptr + co0, attention_ptr + n * (M * C_OUT) + co0,
        offs_m, co, mask_co, C_OUT,
        M, KERNEL, SPAN, PARTS, HAS_TAPS, W_BRANCH, RUN_W, BLOCK_CI, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip

    for tile in range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES)):
        y = run_origin(tile // TILES_W * BLOCK_H + offs_p // BLOCK_W, RUN_H, SPACING)
        x = run_origin(tile % TILES_W * BLOCK_W + offs_p % BLOCK_W, RUN_W, SPACING)
        mask_p = (y < H) & (x < W)
        x_out = x[None, :] + (offs_m // BLOCK_CO)[:, None] * SPACING  # [BLOCK_M, BLOCK_P]
        offs_v = (y * stride_vh)[None, :] + x_out * stride_vw + (co * stride_vc)[:, None]
        mask_out = (offs_m >= 0)[:, None] & (offs_p >= 0)[None, :]
        if HAS_PIXEL_MASK:
            mask_out = mask_p[None, :] & (x_out < W)
        if HAS_CHANNEL_MASK:
            mask_out &= mask_co[:, None]
        rows = ()
        for r in tl.static_range(RUN_H):
            # The rows that output r is the first to need, and some of the next ones, in flight while it is computed.
            for i in tl.static_range(
                0 if r == 0 else (r - 1) * STEP + KERNEL + ROWS_AHEAD, r * STEP + KERNEL + ROWS_AHEAD
            ):  # fmt: skip
                if i >= START and i < STOP:
                    for part in tl.static_range(len(PARTS) - 1):
                        row = read_part(
                            x_ptr + (i - HALF) * PITCH * stride_xh, y, x, mask_p, ci_end, H_IN, W_IN,
                            stride_xh, stride_xw, (i - HALF) * PITCH, (PARTS[part] - HALF) * PITCH, PITCH, STRIDE,
                            BLOCK_CI, (PARTS[part + 1] - PARTS[part]) * BLOCK_CI,
                            HAS_PIXEL_MASK, not (IS_EVEN_H and i >= HALF and i <= LAST_OWN), HAS_CHANNEL_MASK,
                        )  # fmt: skip
                        rows = rows + (row,)
            acc = tl.broadcast_to(shift[:, None], [BLOCK_M, BLOCK_P])
            if IS_RELATIVE:
                acc = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
            for ky in tl.static_range(KERNEL):
                if r * STEP + ky >= START and r * STEP + ky < STOP:
                    for part in tl.static_range(len(PARTS) - 1):
                        weight = weights[ky * (len(PARTS) - 1) + part]
                        row = rows[(r * STEP + ky - START) * (len(PARTS) - 1) + part]
                        acc = tl.dot(weight, row, acc, input_precision=PRECISION)
            if IS_RELATIVE:
                acc = acc * factor[:, None] + shift[:, None]
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
    branches: ConvShape,
    allow_tf32: bool,
    config: MergedConfig | WindowConfig,
) -> Launch:
    """Write `v [N, C_out, H, W]`, the sum over m of `attention[:, m] * (scale[m] * conv_m(x) + shift[m])`.

    `x [N, C_in, H_in, W_in]`, channels adjacent in memory (stride 1), other strides free; strides of `v` are free. `w`
    from `branch_weight_launch`; `scale` and `shift [M, C_out]`, `attention [N, M, C_out]` fp32, contiguous. The merged
    weights are rounded to x's dtype.
    """
    if isinstance(config, WindowConfig):
        return merged_conv_window_fwd(x, w, scale, shift, attention, v, branches, config)
    shape = merged_shape(branches)
    n, _, h_in, w_in = x.shape
    _, _, h, w_out = v.shape
    m, kernel = len(shape.kernels), shape.kernels[0]
    layout = blocking(shape, config)
    pitch, spacing = layout.spacings[0] * shape.stride // layout.steps[0], layout.spacings[0]
    tiles_h, tiles_w = tiles(shape, config, h, w_out)
    parts = row_parts(shape, config, x.dtype)
    has_taps = branch_blocks(branches, config, x.dtype)
    # In 16 bits only what is read is packed (`weight_orders.merging_order`).
    w_branch = kernel * parts[-1] * config.RUN_W * config.BLOCK_CO * config.BLOCK_CI
    covered = tiles_h * config.BLOCK_H * config.RUN_H * tiles_w * config.BLOCK_W * config.RUN_W
    per_program = min(config.TILES_PER_PROGRAM, tiles_h * tiles_w)
    splits = cdiv(tiles_h * tiles_w, per_program)
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
        "PARTS": parts,
        "HAS_TAPS": has_taps,
        "W_BRANCH": w_branch if x.dtype.itemsize == 2 else layout.offsets[1],
        "IS_EVEN_H": h % (config.RUN_H * spacing) == 0,
        "IS_WHOLE_H": is_whole_height(shape, config, h),
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
        "HAS_CHANNEL_MASK": not is_full(shape, config),
        "IS_LARGE": needs_64_bits(x, v),
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
