"""The gradient of the gate in training, but for its parameters; see :mod:`.gate_train` for how sums are cut."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .gate_train import BLOCK_C, BLOCK_N, block_d, norm_rows, norm_warps, sum_of_summands, tile_sums
from .geometry import cdiv
from .launch import Launch


@triton.jit(do_not_specialize=("N", "TILES"))
def gate_select_bwd_kernel(
    sums_ptr, affine_ptr, attention_ptr, select_ptrs, total_ptr, dlogits_ptr, summand_ptr,
    N, TILES, C, D,
    M: tl.constexpr, SUMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of BLOCK_N samples x BLOCK_C channels, and what these add to that of z."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = n < N, c < C
    mask = mask_n[:, None] & mask_c[None, :]
    offs_n = n.to(tl.int64)[:, None]
    stride_t = tl.cast(N, tl.int64) * M * C
    das = ()
    inner = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        offs = (offs_n * M + m) * C + c[None, :]
        if HAS_TOTAL:
            for i in tl.static_range(SUMS):
                total = tile_sums(sums_ptr + i * TILES * stride_t, offs, mask, TILES, stride_t)
                tl.store(total_ptr + i * stride_t + offs, total, mask=mask)
                if i == 0:
                    grad = total
                if i == 1:
                    da = total
        else:
            grad = tl.load(sums_ptr + offs, mask=mask, other=0.0)
            da = tl.load(sums_ptr + stride_t + offs, mask=mask, other=0.0)
        if HAS_NORM:
            beta = tl.load(affine_ptr + m * C + c, mask=mask_c, other=0.0)[None, :]
            gamma = tl.load(affine_ptr + (M + m) * C + c, mask=mask_c, other=0.0)[None, :]
            da = gamma * da + beta * grad
        das = das + (da,)
        inner += tl.load(attention_ptr + offs, mask=mask, other=0.0) * da
    dlogits = ()
    for m in tl.static_range(M):
        offs = (offs_n * M + m) * C + c[None, :]
        dlogit = tl.load(attention_ptr + offs, mask=mask, other=0.0) * (das[m] - inner)
        tl.store(dlogits_ptr + offs, dlogit, mask=mask)
        dlogits = dlogits + (dlogit,)
    summand_ptr += (tl.program_id(1) * tl.cast(N, tl.int64) + offs_n) * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask_w = mask_c[:, None] & (d < D)[None, :]
        dz = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for m in tl.static_range(M):
            w = tl.load(select_ptrs[m] + c[:, None] * D + d[None, :], mask=mask_w, other=0.0)
            dz = tl.dot(dlogits[m], w.to(tl.float32), dz, input_precision="ieee")
        tl.store(summand_ptr + d[None, :], dz, mask=mask_n[:, None] & (d < D)[None, :])


@triton.jit
def descriptor_grad(
    summand_ptr, h_ptr, z_ptr, n, d, mean, rstd, N, D, SUMMANDS,
    STATISTICS: tl.constexpr, HAS_RELU: tl.constexpr,
):  # fmt: skip
    """Rows `n` of the gradient before the activation, 0 past the last, and the normalized hidden features."""
    mask = (n < N)[:, None] & (d < D)[None, :]
    offs = n.to(tl.int64)[:, None] * D + d[None, :]
    dz = sum_of_summands(summand_ptr, n, d, N, D, SUMMANDS)
    if HAS_RELU:
        # `~(z <= 0)`, not `z > 0`: a NaN passes, as it does in `torch.relu`.
        dz = tl.where(~(tl.load(z_ptr + offs, mask=mask, other=0.0) <= 0.0), dz, 0.0)
    h_hat = dz
    if STATISTICS != "none":
        h = tl.load(h_ptr + offs, mask=mask, other=0.0)
        h_hat = tl.where(mask, (h - mean[None, :]) * rstd[None, :], 0.0)
    return dz, h_hat


@triton.jit(do_not_specialize=("N", "SUMMANDS"))
def gate_norm_bwd_kernel(
    summand_ptr, h_ptr, z_ptr, mean_ptr, rstd_ptr, gamma_ptr, dh_ptr, dgamma_ptr, dbeta_ptr, dbias_ptr,
    N, D, SUMMANDS,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STATISTICS: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_RELU: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_D hidden features of all samples, of their bias and their norm."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = d < D
    rows = tl.arange(0, BLOCK_N)
    mean = tl.zeros([BLOCK_D], tl.float32)
    rstd = tl.full([BLOCK_D], 1.0, tl.float32)
    gain = tl.full([BLOCK_D], 1.0, tl.float32)
    dbeta = tl.zeros([BLOCK_D], tl.float32)
    dgamma = tl.zeros([BLOCK_D], tl.float32)
    if STATISTICS != "none":
        mean = tl.load(mean_ptr + d, mask=mask_d, other=0.0)
        rstd = tl.load(rstd_ptr + d, mask=mask_d, other=0.0)
        gain = rstd
        if HAS_GAMMA:
            gain = rstd * tl.load(gamma_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
        plain = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        scaled = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            dz, h_hat = descriptor_grad(
                summand_ptr, h_ptr, z_ptr, n0 + rows, d, mean, rstd, N, D, SUMMANDS, STATISTICS, HAS_RELU
            )
            plain += dz
            scaled += dz * h_hat
        dbeta = tl.sum(plain, axis=0)
        dgamma = tl.sum(scaled, axis=0)
        tl.store(dbeta_ptr + d, dbeta.to(dbeta_ptr.dtype.element_ty), mask=mask_d)
        tl.store(dgamma_ptr + d, dgamma.to(dgamma_ptr.dtype.element_ty), mask=mask_d)
    bias = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + rows
        dz, h_hat = descriptor_grad(
            summand_ptr, h_ptr, z_ptr, n, d, mean, rstd, N, D, SUMMANDS, STATISTICS, HAS_RELU
        )
        dh = dz
        if STATISTICS == "batch":
            dh = dz - (dbeta / N)[None, :] - h_hat * (dgamma / N)[None, :]
        dh = tl.where((n < N)[:, None], dh * gain[None, :], 0.0)
        mask = (n < N)[:, None] & mask_d[None, :]
        tl.store(dh_ptr + n.to(tl.int64)[:, None] * D + d[None, :], dh, mask=mask)
        bias += dh
    tl.store(dbias_ptr + d, tl.sum(bias, axis=0).to(dbias_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=("N", "PIXELS"))
def gate_reduce_bwd_kernel(
    dh_ptr, reduce_ptr, pooled_grad_ptr,
    N, C, D, PIXELS,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every pixel's share in the gradient of the pooled features, BLOCK_N samples x BLOCK_C channels."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n, mask_c = n < N, c < C
    offs_n = n.to(tl.int64)[:, None]
    ds = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask_d = d < D
        dh = tl.load(dh_ptr + offs_n * D + d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        w = tl.load(
            reduce_ptr + d[:, None] * C + c[None, :], mask=mask_d[:, None] & mask_c[None, :], other=0.0
        )
        ds = tl.dot(dh, w.to(tl.float32), ds, input_precision="ieee")
    mask = mask_n[:, None] & mask_c[None, :]
    tl.store(pooled_grad_ptr + offs_n * C + c[None, :], ds / PIXELS, mask=mask)


def gate_select_bwd(
    sums: torch.Tensor,
    affine: torch.Tensor,
    attention: torch.Tensor,
    select_weights: Sequence[torch.Tensor],
    total: torch.Tensor | None,
    dlogits: torch.Tensor,
    summands: torch.Tensor,
    *,
    has_norm: bool,
) -> Launch:
    """Write the gradient of the logits, `dlogits [N, M, C]`, and what blocks of channels add to that of z, `summands`
    of `summand_shape`; all fp32, contiguous.

    `sums [2 or 4, TILES, N, M, C]`: `grad`, `scaled` and perhaps others of `select_bwd`; `total`, needed where there
    are several tiles, receives all of them added over tiles. `affine [2, M, C]`, beta and gamma, read with `has_norm`:
    the attention's gradient is `gamma * scaled + beta * grad`, without norm it is `scaled`. M `select_weights [C, D]`.
    """
    count, tiles, n, m, c = sums.shape
    d = summands.shape[2]
    arguments = (
        sums, affine, attention, tuple(select_weights), dlogits if total is None else total, dlogits, summands,
        n, tiles, c, d,
    )  # fmt: skip
    constexprs = {
        "M": m,
        "SUMS": count,
        "BLOCK_N": BLOCK_N,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": block_d(d),
        "HAS_NORM": has_norm,
        "HAS_TOTAL": total is not None,
    }
    grid = (cdiv(n, BLOCK_N), cdiv(c, BLOCK_C))
    trips = (tiles - 1,) * (m * count if total is not None else 0) + (cdiv(d, block_d(d)),)
    return Launch(gate_select_bwd_kernel, grid, arguments, constexprs, {"num_warps": 4}, trips)


def gate_norm_bwd(
    summands: torch.Tensor,
    h: torch.Tensor,
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor | None,
    dh: torch.Tensor,
    dgamma: torch.Tensor,
    dbeta: torch.Tensor,
    dbias: torch.Tensor,
    *,
    statistics: str,
    has_relu: bool,
) -> Launch:
    """Write the gradient of the hidden features, `dh [N, D]` fp32, and of bias and norm, `[D]` of any dtype, from the
    `summands` of that of z; the norm's are not written under `statistics` "none". The rest as `gate_norm_fwd`."""
    count, n, d = summands.shape
    arguments = (
        summands, h, z, mean, rstd, h if gamma is None else gamma, dh, dgamma, dbeta, dbias, n, d, count,
    )  # fmt: skip
    rows = norm_rows(n)
    constexprs = {
        "BLOCK_N": rows,
        "BLOCK_D": 16,
        "STATISTICS": statistics,
        "HAS_GAMMA": gamma is not None,
        "HAS_RELU": has_relu,
    }
    trips = (cdiv(n, rows), count - 1) * (1 + (statistics != "none"))
    options = {"num_warps": norm_warps(rows)}
    return Launch(gate_norm_bwd_kernel, (cdiv(d, 16),), arguments, constexprs, options, trips)


def gate_reduce_bwd(
    dh: torch.Tensor, reduce_weight: torch.Tensor, pooled_grad: torch.Tensor, *, pixels: int
) -> Launch:
    """Write `pooled_grad [N, C] = dh @ reduce_weight / pixels`, from `dh [N, D]`, fp32; `reduce_weight [D, C]`."""
    n, c = pooled_grad.shape
    d = dh.shape[1]
    arguments = (dh, reduce_weight, pooled_grad, n, c, d, pixels)
    constexprs = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C, "BLOCK_D": block_d(d)}
    grid = (cdiv(n, BLOCK_N), cdiv(c, BLOCK_C))
    trips = (cdiv(d, block_d(d)),)
    return Launch(gate_reduce_bwd_kernel, grid, arguments, constexprs, {"num_warps": 4}, trips)
