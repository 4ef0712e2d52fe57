"""The gate: pooled partial sums to attention, in one launch (Li et al. 2019, Eqs. 2, 3 and 5)."""

import torch
import triton
import triton.language as tl

from .config import GateConfig
from .geometry import cdiv, next_power_of_2
from .launch import Launch
from .tiling import relu, store_tagged


@triton.jit
def gate_logits(
    partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr,
    n, mask_n, row, mask_row, d0, TILES, C, D, PIXELS, stride_partial_n, stride_partial_t,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_RELU: tl.constexpr,
):  # fmt: skip
    """What BLOCK_D entries of the descriptor z, from `d0` on, add to the logits of the select rows. [ROWS, rows]

    `n` and `mask_n` are of BLOCK_T * BLOCK_N rows, a tile's samples adjacent. What does not wait for z is loaded before
    z is computed.
    """
    dtype = reduce_ptr.dtype.element_ty
    offs_s = tl.arange(0, BLOCK_S)
    t = tl.arange(0, BLOCK_T * BLOCK_N) // BLOCK_N
    d = d0 + tl.arange(0, BLOCK_D)
    mask_d = d < D
    scale = tl.load(scale_ptr + d, mask=mask_d, other=0.0)
    shift = tl.load(shift_ptr + d, mask=mask_d, other=0.0)
    offs_select = row[:, None] * D + d[None, :]
    mask_select = mask_row[:, None] & mask_d[None, :]
    # Of fp32, which products without tensor cores take from registers, ptxas would spill what is loaded early.
    IS_EARLY: tl.constexpr = dtype != tl.float32
    if IS_EARLY:
        w_select = tl.load(select_ptr + offs_select, mask=mask_select, other=0.0)
    z = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for s0 in range(0, C, BLOCK_S):
        mask_s = s0 + offs_s < C
        offs_partial = (n * stride_partial_n + t * stride_partial_t)[:, None] + (s0 + offs_s)[None, :]
        mask_partial = (mask_n & (t < TILES))[:, None] & mask_s[None, :]
        s = tl.load(partial_ptr + offs_partial, mask=mask_partial, other=0.0)
        # After the sums' first loads: Triton waits for an operand of a product where it is loaded.
        mask_w = mask_d[:, None] & mask_s[None, :]
        w = tl.load(reduce_ptr + d[:, None] * C + (s0 + offs_s)[None, :], mask=mask_w, other=0.0)
        for t0 in range(BLOCK_T, TILES, BLOCK_T):
            mask_partial = (mask_n & (t0 + t < TILES))[:, None] & mask_s[None, :]
            s += tl.load(partial_ptr + t0 * stride_partial_t + offs_partial, mask=mask_partial, other=0.0)
        if BLOCK_T > 1:
            s = tl.sum(tl.reshape(s, [BLOCK_T, BLOCK_N, BLOCK_S]), axis=0)
        s = (s / PIXELS).to(dtype)
        if BLOCK_N < ROWS:
            # A product has no fewer rows: the samples repeat.
            s = tl.broadcast_to(s[None, :, :], [ROWS // BLOCK_N, BLOCK_N, BLOCK_S])
            s = tl.reshape(s, [ROWS, BLOCK_S])
        z = tl.dot(s, tl.trans(w), z, input_precision="ieee")
        if IS_EARLY:
            # Always true, which Triton does not see: it would wait for this operand before it loads what follows.
            w_select = tl.where(s0 >= 0, w_select, 0.0)
    z = z * scale[None, :] + shift[None, :]
    if HAS_RELU:
        z = relu(z)
    if not IS_EARLY:
        w_select = tl.load(select_ptr + offs_select, mask=mask_select, other=0.0)
    return tl.dot(z.to(dtype), tl.trans(w_select), input_precision="ieee")


@triton.jit
def all_logits(
    partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr, select_bias_ptr,
    n, mask_n, c0, TILES, C, D, PIXELS, stride_partial_n, stride_partial_t,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, IS_ONE_BLOCK_D: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_SELECT_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_N samples for BLOCK_C channels from `c0` on and all M branches. [ROWS, BLOCK_M * BLOCK_C]

    `n` and `mask_n` as in `gate_logits`, which computes the whole descriptor z, BLOCK_D entries and BLOCK_S pooled
    channels at a time, BLOCK_T tiles of each.
    """
    offs_mc = tl.arange(0, BLOCK_M * BLOCK_C)
    m = offs_mc // BLOCK_C
    c = c0 + offs_mc % BLOCK_C
    mask_mc = (m < M) & (c < C)
    row = m * C + c

    if HAS_SELECT_BIAS:
        bias = tl.load(select_bias_ptr + row, mask=mask_mc, other=0.0)
    logits = gate_logits(
        partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr,
        n, mask_n, row, mask_mc, 0, TILES, C, D, PIXELS, stride_partial_n, stride_partial_t,
        BLOCK_N, ROWS, BLOCK_T, BLOCK_S, BLOCK_D, HAS_RELU,
    )  # fmt: skip
    # Left out where it would not run: ptxas spills accumulators that live across a loop, however cold.
    if not IS_ONE_BLOCK_D:
        for d0 in range(BLOCK_D, D, BLOCK_D):
            logits += gate_logits(
                partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr,
                n, mask_n, row, mask_mc, d0, TILES, C, D, PIXELS, stride_partial_n, stride_partial_t,
                BLOCK_N, ROWS, BLOCK_T, BLOCK_S, BLOCK_D, HAS_RELU,
            )  # fmt: skip
    if HAS_SELECT_BIAS:
        logits += bias[None, :]
    return tl.where((m < M)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=("N", "TILES", "PIXELS"))
def gate_fwd_kernel(
    partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr, select_bias_ptr, attention_ptr,
    N, TILES, C, D, PIXELS,
    stride_partial_n, stride_partial_t,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, IS_ONE_BLOCK_D: tl.constexpr,
    HAS_RELU: tl.constexpr, HAS_SELECT_BIAS: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_N samples for BLOCK_C channels and all M branches.

    Every program computes the whole descriptor: cheaper than a second launch or a grid-wide wait.
    """
    ROWS: tl.constexpr = 16 if BLOCK_N < 16 else BLOCK_N
    n0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_T * BLOCK_N) % BLOCK_N
    c0 = tl.program_id(1) * BLOCK_C
    logits = all_logits(
        partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr, select_bias_ptr,
        n, n < N, c0, TILES, C, D, PIXELS, stride_partial_n, stride_partial_t,
        M, BLOCK_M, BLOCK_N, ROWS, BLOCK_T, BLOCK_S, BLOCK_D, BLOCK_C, IS_ONE_BLOCK_D, HAS_RELU, HAS_SELECT_BIAS,
    )  # fmt: skip
    logits = tl.reshape(logits, [ROWS, BLOCK_M, BLOCK_C])
    # A maximum may drop NaN; the subtraction puts it back, so one NaN logit makes all its branches NaN.
    e = tl.exp(logits - tl.max(logits, axis=1)[:, None, :])
    attention = tl.reshape(e / tl.sum(e, axis=1)[:, None, :], [ROWS, BLOCK_M * BLOCK_C])
    offs_mc = tl.arange(0, BLOCK_M * BLOCK_C)
    m = offs_mc // BLOCK_C
    c = c0 + offs_mc % BLOCK_C
    mask_mc = (m < M) & (c < C)
    i = tl.arange(0, ROWS)
    mask_i = (i < BLOCK_N) & (n0 + i < N)
    offs_attention = (n0 + i)[:, None] * (M * C) + (m * C + c)[None, :]
    tl.store(attention_ptr + offs_attention, attention, mask=mask_i[:, None] & mask_mc[None, :])


@triton.jit
def gate_sample(
    partial_ptr, reduce_ptr, scale_ptr, shift_ptr, select_ptr, select_bias_ptr, attention_ptr, tag, c_first, c_stop,
    TILES, C, D, PIXELS, stride_partial_t,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, HAS_RELU: tl.constexpr, HAS_SELECT_BIAS: tl.constexpr,
):  # fmt: skip
    """Attention of one sample for channels `c_first` to `c_stop`, all branches, as tagged words (`load_attention`).

    `gate_fwd_kernel` for one sample: multiply-adds in fp32 instead of products, BLOCK_T tiles loaded at a time, since
    here one warp's latency counts. The descriptor z is computed once, in one block: D is at most BLOCK_D.
    """
    offs_t = tl.arange(0, BLOCK_T)
    offs_s = tl.arange(0, BLOCK_S)
    offs_mc = tl.arange(0, BLOCK_M * BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    mask_d = d < D
    z = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    for s0 in range(0, C, BLOCK_S):
        mask_s = s0 + offs_s < C
        sums = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for t0 in range(0, TILES, BLOCK_T):
            offs_partial = (t0 + offs_t)[:, None] * stride_partial_t + (s0 + offs_s)[None, :]
            mask = (t0 + offs_t < TILES)[:, None] & mask_s[None, :]
            sums += tl.load(partial_ptr + offs_partial, mask=mask, other=0.0)
        mask_w = mask_d[:, None] & mask_s[None, :]
        w = tl.load(reduce_ptr + d[:, None] * C + (s0 + offs_s)[None, :], mask=mask_w, other=0.0)
        z += w.to(tl.float32) * (tl.sum(sums, axis=0) / PIXELS)[None, :]
    scale = tl.load(scale_ptr + d, mask=mask_d, other=0.0)
    shift = tl.load(shift_ptr + d, mask=mask_d, other=0.0)
    z = tl.sum(z, axis=1) * scale + shift
    if HAS_RELU:
        z = relu(z)

    m = offs_mc // BLOCK_C
    for c0 in range(c_first, c_stop, BLOCK_C):
        c = c0 + offs_mc % BLOCK_C
        mask_mc = (m < M) & (c < c_stop)
        row = m * C + c
        mask_w = mask_mc[:, None] & mask_d[None, :]
        w = tl.load(select_ptr + row[:, None] * D + d[None, :], mask=mask_w, other=0.0)
        logits = tl.sum(w.to(tl.float32) * z[None, :], axis=1)
        if HAS_SELECT_BIAS:
            logits += tl.load(select_bias_ptr + row, mask=mask_mc, other=0.0)
        logits = tl.reshape(tl.where(m < M, logits, float("-inf")), [BLOCK_M, BLOCK_C])
        # As in `gate_fwd_kernel`: the subtraction hands NaN on.
        e = tl.exp(logits - tl.max(logits, axis=0)[None, :])
        attention = tl.reshape(e / tl.sum(e, axis=0)[None, :], [BLOCK_M * BLOCK_C])
        store_tagged(attention_ptr + row, attention, mask_mc, tag)


def gate_fwd(
    partial: torch.Tensor,
    reduce_weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    select_weight: torch.Tensor,
    select_bias: torch.Tensor | None,
    attention: torch.Tensor,
    *,
    pixels: int,
    has_relu: bool,
    config: GateConfig,
) -> Launch:
    """Write `attention [N, M, C]` (fp32) from `partial [N, TILES, C]` (fp32 sums over branches and a tile's pixels).

    `z = act((W1 @ sum(partial) / pixels) * scale + shift)`, logits `W2 @ z + b2`, softmax over M. `reduce_weight
    [D, C]` and `select_weight [M, C, D]` are contiguous and share one dtype, to which the products' operands are
    rounded; `scale [D]`, `shift [D]` and `select_bias [M, C]` are fp32.
    """
    n, tiles, c = partial.shape
    m, _, d = select_weight.shape
    arguments = (
        partial, reduce_weight, scale, shift, select_weight, scale if select_bias is None else select_bias, attention,
        n, tiles, c, d, pixels, partial.stride(0), partial.stride(1),
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_M": next_power_of_2(m),
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_T": min(config.BLOCK_T, next_power_of_2(tiles)),
        "BLOCK_S": config.BLOCK_S,
        "BLOCK_D": config.BLOCK_D,
        "BLOCK_C": config.BLOCK_C,
        "IS_ONE_BLOCK_D": d <= config.BLOCK_D,
        "HAS_RELU": has_relu,
        "HAS_SELECT_BIAS": select_bias is not None,
    }
    grid = (cdiv(n, config.BLOCK_N), cdiv(c, config.BLOCK_C))
    return Launch(gate_fwd_kernel, grid, arguments, constexprs, {"num_warps": config.num_warps})
