"""The gate in training: from pooled sums to the attention in three launches (Li et al. 2019, Eqs. 2, 3 and 5).

Whatever adds over channels does so by blocks of them: each block's summand is written, and where it is read, all are
added in one order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .geometry import cdiv, next_power_of_2
from .launch import Launch
from .norm import join_moments, lane_moments, update_statistics
from .running import Running, momentum_of, pointers_of
from .tiling import relu

BLOCK_N = 16
"""Samples of a program; a product has no fewer rows."""
BLOCK_C = 64
"""Channels that a summand over channels adds up."""
MOST_ROWS = 128
"""Samples that a program of the norm takes at a time."""


@triton.jit
def sum_of_summands(summand_ptr, n, d, N, D, SUMMANDS):
    """Rows `n`, entries `d` of `[SUMMANDS, N, D]`, added up; 0 outside. [rows, entries]"""
    mask = (n < N)[:, None] & (d < D)[None, :]
    summand_ptr += n.to(tl.int64)[:, None] * D + d[None, :]
    stride = tl.cast(N, tl.int64) * D
    acc = tl.load(summand_ptr, mask=mask, other=0.0)
    for i in range(1, SUMMANDS):
        acc += tl.load(summand_ptr + i * stride, mask=mask, other=0.0)
    return acc


@triton.jit
def tile_sums(sums_ptr, offs, mask, TILES, stride_t):
    """What all tiles add to a sum, at the offsets of the first."""
    acc = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    for _ in range(1, TILES):
        sums_ptr += stride_t
        acc += tl.load(sums_ptr + offs, mask=mask, other=0.0)
    return acc


@triton.jit(do_not_specialize=("N", "TILES", "PIXELS"))
def gate_reduce_fwd_kernel(
    active_ptr, pooled_ptr, affine_ptr, reduce_ptr, total_ptr, s_ptr, summand_ptr,
    N, TILES, C, D, PIXELS, stride_t, stride_n, stride_m,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """Pooled features of BLOCK_N samples x BLOCK_C channels, and what these add to the hidden ones."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = n < N, c < C
    mask = mask_n[:, None] & mask_c[None, :]
    offs_n = n.to(tl.int64)[:, None]
    s = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        offs = offs_n * stride_n + m * stride_m + c[None, :]
        pooled = tile_sums(pooled_ptr, offs, mask, TILES, stride_t)
        if HAS_NORM:
            active = tile_sums(active_ptr, offs, mask, TILES, stride_t)
            beta = tl.load(affine_ptr + m * C + c, mask=mask_c, other=0.0)[None, :]
            gamma = tl.load(affine_ptr + (M + m) * C + c, mask=mask_c, other=0.0)[None, :]
            s += gamma * pooled + beta * active
            if HAS_TOTAL:
                offs_total = (offs_n * M + m) * C + c[None, :]
                tl.store(total_ptr + offs_total, active, mask=mask)
                tl.store(total_ptr + tl.cast(N, tl.int64) * M * C + offs_total, pooled, mask=mask)
        else:
            s += pooled
    s = s / PIXELS
    tl.store(s_ptr + offs_n * C + c[None, :], s, mask=mask)
    summand_ptr += (tl.program_id(1) * tl.cast(N, tl.int64) + offs_n) * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask_w = (d < D)[:, None] & mask_c[None, :]
        w = tl.load(reduce_ptr + d[:, None] * C + c[None, :], mask=mask_w, other=0.0).to(tl.float32)
        h = tl.dot(s, tl.trans(w), input_precision="ieee")
        tl.store(summand_ptr + d[None, :], h, mask=mask_n[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=("N", "SUMMANDS"))
def gate_norm_fwd_kernel(
    summand_ptr, bias_ptr, gamma_ptr, beta_ptr, given_mean_ptr, given_var_ptr,
    h_ptr, z_ptr, mean_ptr, rstd_ptr, var_ptr, running_mean_ptrs, running_var_ptrs, counter_ptrs,
    N, D, SUMMANDS, epsilon, correction, momentum,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STATISTICS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_RELU: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
):  # fmt: skip
    """BLOCK_D hidden features of all samples and z, normalized by STATISTICS: "batch", "given" or "none"."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < D
    rows = tl.arange(0, BLOCK_N)
    bias = tl.zeros([1, BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    gain = tl.full([1, BLOCK_D], 1.0, tl.float32)
    if HAS_GAMMA:
        gain = tl.load(gamma_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    beta = tl.zeros([1, BLOCK_D], tl.float32)
    if HAS_BETA:
        beta = tl.load(beta_ptr + d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    mean = tl.zeros([BLOCK_D], tl.float32)
    rstd = tl.full([BLOCK_D], 1.0, tl.float32)
    if STATISTICS == "batch":
        pivot = sum_of_summands(summand_ptr, rows, d, N, D, SUMMANDS) + bias
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for n0 in range(BLOCK_N, N, BLOCK_N):
            h = sum_of_summands(summand_ptr, n0 + rows, d, N, D, SUMMANDS) + bias
            away = tl.where((n0 + rows < N)[:, None], h - pivot, 0.0)
            total += away
            squares += away * away
        count = tl.maximum((N - rows + BLOCK_N - 1) // BLOCK_N, 0).to(tl.float32)
        count = tl.broadcast_to(count[:, None], [BLOCK_N, BLOCK_D])
        mean, m2 = lane_moments(pivot, total, squares, count)
        mean, m2, _ = join_moments(mean, m2, count, 0)
        var = m2 / N
        unbiased = var * correction
        tl.store(var_ptr + d, unbiased, mask=mask_d)
        if HAS_RUNNING:
            update_statistics(
                running_mean_ptrs[0], running_var_ptrs[0], counter_ptrs[0], mean, unbiased, d, mask_d, momentum,
                tl.program_id(0) == 0,
            )  # fmt: skip
        rstd = 1.0 / tl.sqrt_rn(var + epsilon)
    elif STATISTICS == "given":
        mean = tl.load(given_mean_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
        var = tl.load(given_var_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(var_ptr + d, var, mask=mask_d)
        rstd = 1.0 / tl.sqrt_rn(var + epsilon)
    if STATISTICS != "none":
        tl.store(mean_ptr + d, mean, mask=mask_d)
        tl.store(rstd_ptr + d, rstd, mask=mask_d)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + rows
        mask = (n < N)[:, None] & mask_d[None, :]
        offs = n.to(tl.int64)[:, None] * D + d[None, :]
        h = sum_of_summands(summand_ptr, n, d, N, D, SUMMANDS) + bias
        tl.store(h_ptr + offs, h, mask=mask)
        z = h
        if STATISTICS != "none":
            z = (h - mean[None, :]) * rstd[None, :] * gain + beta
        if HAS_RELU:
            z = relu(z)
        tl.store(z_ptr + offs, z, mask=mask)


@triton.jit(do_not_specialize=("N",))
def gate_select_fwd_kernel(
    z_ptr, select_ptrs, bias_ptrs, attention_ptr,
    N, C, D,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_N samples x BLOCK_C channels, all branches."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = n < N, c < C
    offs_n = n.to(tl.int64)[:, None]
    logits = ()
    for m in tl.static_range(M):
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask_d = d < D
            z = tl.load(z_ptr + offs_n * D + d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            offs_w = c[:, None] * D + d[None, :]
            w = tl.load(select_ptrs[m] + offs_w, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            acc = tl.dot(z, tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
        if HAS_BIAS:
            acc += tl.load(bias_ptrs[m] + c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        logits = logits + (acc,)
    # A maximum may drop NaN; the subtraction puts it back, so one NaN logit makes all its branches NaN.
    highest = logits[0]
    for m in tl.static_range(1, M):
        highest = tl.maximum(highest, logits[m])
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        total += tl.exp(logits[m] - highest)
    for m in tl.static_range(M):
        a = tl.exp(logits[m] - highest) / total
        mask = mask_n[:, None] & mask_c[None, :]
        tl.store(attention_ptr + (offs_n * M + m) * C + c[None, :], a, mask=mask)


def summand_shape(n: int, c: int, d: int) -> tuple[int, int, int]:
    """Shape of the fp32 workspaces `summands`: what each block of `c` channels adds to `d` entries of `n` samples."""
    return cdiv(c, BLOCK_C), n, d


def block_d(d: int) -> int:
    """Entries of the descriptor z that a program takes at a time."""
    return min(32, max(16, next_power_of_2(d)))


def norm_rows(n: int) -> int:
    """Samples that a program of the gate's norm takes at a time."""
    return min(MOST_ROWS, max(16, next_power_of_2(n)))


def norm_warps(rows: int) -> int:
    """Its warps: 8 entries a thread."""
    return max(1, rows * 16 // 256)


def gate_reduce_fwd(
    active: torch.Tensor,
    pooled: torch.Tensor,
    affine: torch.Tensor,
    reduce_weight: torch.Tensor,
    total: torch.Tensor | None,
    s: torch.Tensor,
    summands: torch.Tensor,
    *,
    pixels: int,
    has_norm: bool,
) -> Launch:
    """Write the pooled features `s [N, C]` and what blocks of them add to the hidden features, `summands` of
    `summand_shape`; all fp32.

    `active` and `pooled` `[TILES, N, M, C]`, as of `pooled_moments_fwd`, of equal strides, channels adjacent:
    `s = sum(gamma * pooled + beta * active) / pixels` over tiles and branches, with `affine [2, M, C]`, beta and gamma;
    without norm `sum(pooled) / pixels`. `total [2, N, M, C]`, of units with norms, receives the sums over tiles.
    `reduce_weight [D, C]` contiguous.
    """
    tiles, n, m, c = pooled.shape
    d = reduce_weight.shape[0]
    arguments = (
        active, pooled, affine, reduce_weight, s if total is None else total, s, summands,
        n, tiles, c, d, pixels, *pooled.stride()[:3],
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_N": BLOCK_N,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": block_d(d),
        "HAS_NORM": has_norm,
        "HAS_TOTAL": total is not None,
    }
    grid = (cdiv(n, BLOCK_N), cdiv(c, BLOCK_C))
    trips = (tiles - 1,) * m * (1 + has_norm) + (cdiv(d, block_d(d)),)
    return Launch(gate_reduce_fwd_kernel, grid, arguments, constexprs, {"num_warps": 4}, trips)


def gate_norm_fwd(
    summands: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    given: tuple[torch.Tensor, ...],
    h: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    var: torch.Tensor,
    running: Running | None,
    *,
    statistics: str,
    epsilon: float,
    has_relu: bool,
) -> Launch:
    """Write the hidden features `h [N, D]`, the sum of the `summands` and `bias [D]`, and `z = act(norm(h))`, fp32.

    `statistics`: "batch" takes those of the N samples, writes `mean`, `rstd` and the unbiased variance `var`, `[D]`
    fp32, and updates `running`; "given" takes `given`, mean and variance `[D]` (empty for the others), and writes all
    three as well; "none" does not normalize.
    """
    count, n, d = summands.shape
    given_mean, given_var = given or (summands, summands)
    arguments = (
        summands, summands if bias is None else bias, summands if gamma is None else gamma,
        summands if beta is None else beta, given_mean, given_var, h, z, mean, rstd, var,
        *pointers_of([running], h), n, d, count, float(epsilon), n / max(1, n - 1), momentum_of([running]),
    )  # fmt: skip
    rows = norm_rows(n)
    constexprs = {
        "BLOCK_N": rows,
        "BLOCK_D": 16,
        "STATISTICS": statistics,
        "HAS_BIAS": bias is not None,
        "HAS_GAMMA": gamma is not None,
        "HAS_BETA": beta is not None,
        "HAS_RELU": has_relu,
        "HAS_RUNNING": running is not None,
    }
    batch = (count - 1, cdiv(n, rows) - 1, count - 1) if statistics == "batch" else ()
    trips = (*batch, cdiv(n, rows), count - 1)
    options = {"num_warps": norm_warps(rows)}
    return Launch(gate_norm_fwd_kernel, (cdiv(d, 16),), arguments, constexprs, options, trips)


def gate_select_fwd(
    z: torch.Tensor,
    select_weights: Sequence[torch.Tensor],
    select_biases: Sequence[torch.Tensor] | None,
    attention: torch.Tensor,
) -> Launch:
    """Write `attention [N, M, C]`, the softmax over M of `select_weights[m] @ z + select_biases[m]`.

    `z [N, D]` fp32; M `select_weights [C, D]` and `select_biases [C]`, contiguous.
    """
    n, m, c = attention.shape
    d = z.shape[1]
    weights = tuple(select_weights)
    arguments = (z, weights, weights if select_biases is None else tuple(select_biases), attention, n, c, d)
    constexprs = {
        "M": m,
        "BLOCK_N": BLOCK_N,
        "BLOCK_C": 32,
        "BLOCK_D": block_d(d),
        "HAS_BIAS": select_biases is not None,
    }
    grid = (cdiv(n, BLOCK_N), cdiv(c, 32))
    trips = (cdiv(d, block_d(d)),) * m
    return Launch(gate_select_fwd_kernel, grid, arguments, constexprs, {"num_warps": 4}, trips)
