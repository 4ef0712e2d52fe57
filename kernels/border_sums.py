"""What the gate of linear branches pools, without convolving: sums of x over the windows that the taps slide over.

The sum over pixels of `conv_m(x)[co]` is `sum over ci, taps of W_m[co, ci, tap] * S[ci, tap]`, where S[ci, tap] sums x
over the pixels that the tap meets. Rows that meet the same kernel rows form a section, columns likewise; x is summed
once per pair of sections, and the weight of a pair is that of all taps that meet it (`merging.sections`).
"""

import torch
import triton
import triton.language as tl

from .config import BorderConfig
from .geometry import ConvShape, cdiv, needs_64_bits, next_power_of_2
from .launch import Launch
from .tiling import packed, pairs, widen


@triton.jit
def carried_row(ptrs, mask):
    """A row `[pixels, channels]` as a loop may carry it: 16-bit channels in pairs."""
    row = tl.load(ptrs, mask=mask, other=0.0)
    if row.dtype.primitive_bitwidth == 16 and row.shape[1] > 1:
        return packed(row)
    else:
        return row


@triton.jit
def in_fp32(row, dtype: tl.constexpr):
    """What `carried_row` made of channels in `dtype`."""
    if row.dtype == tl.int32:
        row = tl.reshape(pairs(row, dtype), [row.shape[0], row.shape[1] * 2])
    return row.to(tl.float32)


@triton.jit(
    do_not_specialize=("W_IN", "PIXELS", "STRIPS", "STRIPS_PER_PROGRAM", "PROGRAMS_H", "TILES_W", "BLOCKS")
)
def border_sums_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, strips_ptr, columns_ptr, partial_ptr,
    W_IN, C_IN, C_OUT, PIXELS, STRIPS, STRIPS_PER_PROGRAM, PROGRAMS_H, TILES_W, BLOCKS, SECTIONS_W,
    stride_xn, stride_xh, stride_xw, stride_partial_n, stride_partial_t,
    STRIDE: tl.constexpr, GROUP_CI: tl.constexpr, GROUP_CO: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_CO: tl.constexpr,
    BLOCK_W: tl.constexpr, HAS_SHIFT: tl.constexpr, IS_LARGE: tl.constexpr,
):  # fmt: skip
    """Pooled sums of BLOCK_G groups of one sample over STRIPS_PER_PROGRAM strips of rows x BLOCK_W columns.

    A strip is rows of one section, STRIDE apart. A group's GROUP_CI inputs and GROUP_CO outputs are padded to BLOCK_CI
    and BLOCK_CO.
    """
    BLOCK_C: tl.constexpr = BLOCK_G * BLOCK_CI
    stride_xn, stride_xh, stride_xw = widen(stride_xn, stride_xh, stride_xw, IS_LARGE)
    pid = tl.program_id(0)
    block = pid % BLOCKS
    tile = pid // BLOCKS % (TILES_W * PROGRAMS_H)
    n = (pid // BLOCKS // (TILES_W * PROGRAMS_H)).to(tl.int64)
    first = tile // TILES_W * STRIPS_PER_PROGRAM
    offs_c = tl.arange(0, BLOCK_C)
    if GROUP_CI == BLOCK_CI:
        ci = block * BLOCK_C + offs_c
        mask_c = ci < C_IN
    else:
        ci = (block * BLOCK_G + offs_c // BLOCK_CI) * GROUP_CI + offs_c % BLOCK_CI
        mask_c = (ci < C_IN) & (offs_c % BLOCK_CI < GROUP_CI)
    x = tile % TILES_W * BLOCK_W + tl.arange(0, BLOCK_W)
    # Columns that no tap meets are in section -1 and are not read.
    section = tl.load(columns_ptr + x, mask=x < W_IN, other=-1)
    mask_x = (section >= 0)[:, None] & mask_c[None, :]
    offs_x = (x * stride_xw)[:, None] + ci[None, :]
    j = tl.arange(0, BLOCK_CO)
    offs_w = (j * C_IN)[:, None] + ci[None, :]
    mask_w = (j < GROUP_CO)[:, None] & mask_c[None, :]
    x_ptr += n * stride_xn

    pooled = tl.zeros([BLOCK_CO, BLOCK_C], tl.float32)
    last = tl.minimum(first + STRIPS_PER_PROGRAM, STRIPS) - 1
    y0 = tl.load(strips_ptr + first * 3)
    # The row after is on its way while one is added, that of the next strip while columns are.
    row_next = carried_row(x_ptr + y0 * stride_xh + offs_x, mask_x)
    for strip in range(first, last + 1):
        rows = tl.load(strips_ptr + strip * 3 + 1)
        section_h = tl.load(strips_ptr + strip * 3 + 2)
        y0_next = tl.load(strips_ptr + tl.minimum(strip + 1, last) * 3)
        rows_left = rows + tl.where(strip < last, 1, 0)
        w_section = w_ptr + section_h * SECTIONS_W * (GROUP_CO * C_IN)
        w_next = tl.load(w_section + offs_w, mask=mask_w, other=0.0)
        acc = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
        for i in range(rows):
            row = row_next
            y = tl.where(i + 1 < rows, y0 + (i + 1) * STRIDE, y0_next)
            mask_next = tl.where(i + 1 < rows_left, mask_x, False)
            row_next = carried_row(x_ptr + y * stride_xh + offs_x, mask_next)
            acc += in_fp32(row, x_ptr.dtype.element_ty)
        y0 = y0_next
        for section_w in range(SECTIONS_W):
            # The next section's weights are on their way while this one's columns are added.
            w = w_next
            w_section += GROUP_CO * C_IN
            mask_next = (j < tl.where(section_w + 1 < SECTIONS_W, GROUP_CO, 0))[:, None] & mask_c[None, :]
            w_next = tl.load(w_section + offs_w, mask=mask_next, other=0.0)
            sums = tl.sum(tl.where((section == section_w)[:, None], acc, 0.0), axis=0)
            pooled += sums[None, :] * w

    sums = tl.sum(tl.reshape(pooled, [BLOCK_CO, BLOCK_G, BLOCK_CI]), axis=2)
    # [BLOCK_CO, BLOCK_G]
    co = (block * BLOCK_G + tl.arange(0, BLOCK_G))[None, :] * GROUP_CO + j[:, None]
    mask_co = (j < GROUP_CO)[:, None] & (co < C_OUT)
    if HAS_SHIFT:
        sums += tl.load(shift_ptr + co, mask=mask_co, other=0.0) * tl.where(tile == 0, PIXELS, 0)
    tl.store(partial_ptr + n * stride_partial_n + tile * stride_partial_t + co, sums, mask=mask_co)


def border_sums_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    shift: torch.Tensor | None,
    strips: torch.Tensor,
    columns: torch.Tensor,
    partial: torch.Tensor,
    *,
    shape: ConvShape,
    pixels: int,
    config: BorderConfig,
) -> Launch:
    """Write `partial [N, tiles, C_out]` fp32, whose sum over tiles is that of all branches over the `pixels` outputs.

    `x [N, C_in, H_in, W_in]`, channels adjacent in memory (stride 1), other strides free. `w [sections_h, sections_w,
    C_out / groups, C_in]` fp32 from `section_weights`; `shift [C_out]` fp32, the sum of the branches'; `strips
    [strips, 3]` int32 (first row, rows, section) and `columns [W_in]` int32 (section, or -1) from `merging`.
    """
    n, _, _, w_in = x.shape
    _, tiles, c_out = partial.shape
    group_ci, group_co = shape.c_in // shape.groups, shape.c_out // shape.groups
    block_ci = next_power_of_2(group_ci)
    block_g = max(1, min(next_power_of_2(shape.groups), config.BLOCK_C // block_ci))
    blocks = cdiv(shape.groups, block_g)
    programs_h = cdiv(len(strips), config.STRIPS_PER_PROGRAM)
    tiles_w = cdiv(w_in, config.BLOCK_W)
    if tiles != programs_h * tiles_w:
        raise ValueError(f"partial must have {programs_h * tiles_w} tiles, got shape {tuple(partial.shape)}")
    arguments = (
        x, w, w if shift is None else shift, strips, columns, partial,
        w_in, shape.c_in, c_out, pixels, len(strips), config.STRIPS_PER_PROGRAM, programs_h, tiles_w, blocks,
        w.shape[1], x.stride(0), x.stride(2), x.stride(3), partial.stride(0), partial.stride(1),
    )  # fmt: skip
    constexprs = {
        "STRIDE": shape.stride,
        "GROUP_CI": group_ci,
        "GROUP_CO": group_co,
        "BLOCK_G": block_g,
        "BLOCK_CI": block_ci,
        "BLOCK_CO": next_power_of_2(group_co),
        "BLOCK_W": config.BLOCK_W,
        "HAS_SHIFT": shift is not None,
        "IS_LARGE": needs_64_bits(x),
    }
    options = {"num_warps": config.num_warps, "num_stages": 1}
    if config.num_warps == 2 and x.element_size() == 2:
        # Eight programs a processor: the compiler would take up to 155 without spilling less.
        options["maxnreg"] = 128
    grid = (n * programs_h * tiles_w * blocks,)
    return Launch(border_sums_fwd_kernel, grid, arguments, constexprs, options, kept=(strips, columns))
