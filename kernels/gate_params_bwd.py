"""Gradients of the parameters that the gate and the branches' norms have: sums over the samples of a batch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .gate_train import block_d
from .geometry import cdiv
from .launch import Launch

BLOCK_CHANNELS = 16
"""Channels of a program that adds over samples."""
BLOCK_SAMPLES = 64
"""Samples that it takes at a time."""


@triton.jit
def rows_of(ptr, n, entries, mask, stride):
    """Rows `n` of a matrix whose rows are `stride` apart, its `entries`; 0 outside of `mask`."""
    return tl.load(ptr + n.to(tl.int64)[:, None] * stride + entries[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=("N", "PIXELS", "BATCH_NORMS"))
def gate_params_bwd_kernel(
    dh_ptr, s_ptr, z_ptr, dlogits_ptr, attention_ptr, pooled_grad_ptr, grad_ptr, scaled_ptr, active_ptr, pooled_ptr,
    rstd_ptr, gamma_ptr, affine_grad_ptr, terms_ptr,
    dbeta_ptrs, dgamma_ptrs, dbias_ptrs, dreduce_ptr, dselect_ptrs, dselect_bias_ptrs,
    N, C, D, PIXELS, BATCH_NORMS, share,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SELECT_BIAS: tl.constexpr,
):  # fmt: skip
    """Sums over samples for BLOCK_C channels x BLOCK_D entries of z: programs below M take the parameters of a branch,
    and its norm's where they have the first entries; programs M take the weight that reduces channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_c, mask_d = c < C, d < D
    rows = tl.arange(0, BLOCK_N)
    if m == M:
        dreduce = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + rows
            dh = rows_of(dh_ptr, n, d, (n < N)[:, None] & mask_d[None, :], D)
            s = rows_of(s_ptr, n, c, (n < N)[:, None] & mask_c[None, :], C)
            dreduce = tl.dot(tl.trans(dh), s, dreduce, input_precision="ieee")
        mask = mask_d[:, None] & mask_c[None, :]
        offs = d[:, None] * C + c[None, :]
        tl.store(dreduce_ptr + offs, dreduce.to(dreduce_ptr.dtype.element_ty), mask=mask)
    else:
        dselect = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dlogit_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        dbeta_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        dgamma_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + rows
            mask = (n < N)[:, None] & mask_c[None, :]
            z = rows_of(z_ptr, n, d, (n < N)[:, None] & mask_d[None, :], D)
            dlogit = rows_of(dlogits_ptr + m * C, n, c, mask, M * C)
            dselect = tl.dot(tl.trans(dlogit), z, dselect, input_precision="ieee")
            dlogit_sum += dlogit
            a = rows_of(attention_ptr + m * C, n, c, mask, M * C)
            g = rows_of(pooled_grad_ptr, n, c, mask, C)
            grad = rows_of(grad_ptr + m * C, n, c, mask, M * C)
            if HAS_ACTIVE:
                dbeta_sum += a * grad + g * rows_of(active_ptr + m * C, n, c, mask, M * C)
            else:
                dbeta_sum += a * grad + g * PIXELS
            if HAS_NORM:
                scaled = rows_of(scaled_ptr + m * C, n, c, mask, M * C)
                pooled = rows_of(pooled_ptr + m * C, n, c, mask, M * C)
                dgamma_sum += a * scaled + g * pooled
        dbeta = tl.sum(dbeta_sum, axis=0)
        dgamma = tl.sum(dgamma_sum, axis=0)
        is_first = c < tl.where(tl.program_id(2) == 0, C, 0)
        tl.store(affine_grad_ptr + m * C + c, dbeta, mask=is_first)
        tl.store(affine_grad_ptr + (M + m) * C + c, dgamma, mask=is_first)
        is_batch = (BATCH_NORMS >> m) & 1
        # Not a product with zero: an infinity must not become NaN in every sample.
        tl.store(terms_ptr + m * C + c, tl.where(is_batch != 0, dbeta * share, 0.0), mask=is_first)
        tl.store(terms_ptr + (M + m) * C + c, tl.where(is_batch != 0, dgamma * share, 0.0), mask=is_first)
        dbias = dbeta
        if HAS_BIAS and HAS_NORM:
            # No gradient passes a norm that subtracts the batch's mean.
            rstd = tl.load(rstd_ptr + m * C + c, mask=mask_c, other=0.0)
            gamma = tl.load(gamma_ptr + m * C + c, mask=mask_c, other=0.0)
            dbias = tl.where(is_batch != 0, 0.0, dbeta * gamma * rstd)
        dlogit_total = tl.sum(dlogit_sum, axis=0)
        mask_w = mask_c[:, None] & mask_d[None, :]
        for i in tl.static_range(M):
            if m == i:
                dselect_ptr = dselect_ptrs[i]
                offs_w = c[:, None] * D + d[None, :]
                tl.store(dselect_ptr + offs_w, dselect.to(dselect_ptr.dtype.element_ty), mask=mask_w)
                if HAS_NORM:
                    dbeta_ptr, dgamma_ptr = dbeta_ptrs[i], dgamma_ptrs[i]
                    tl.store(dbeta_ptr + c, dbeta.to(dbeta_ptr.dtype.element_ty), mask=is_first)
                    tl.store(dgamma_ptr + c, dgamma.to(dgamma_ptr.dtype.element_ty), mask=is_first)
                if HAS_BIAS:
                    dbias_ptr = dbias_ptrs[i]
                    tl.store(dbias_ptr + c, dbias.to(dbias_ptr.dtype.element_ty), mask=is_first)
                if HAS_SELECT_BIAS:
                    bias_ptr = dselect_bias_ptrs[i]
                    tl.store(bias_ptr + c, dlogit_total.to(bias_ptr.dtype.element_ty), mask=is_first)


def gate_params_bwd(
    dh: torch.Tensor,
    s: torch.Tensor,
    z: torch.Tensor,
    dlogits: torch.Tensor,
    attention: torch.Tensor,
    pooled_grad: torch.Tensor,
    grads: torch.Tensor,
    sums: torch.Tensor | None,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    affine_grad: torch.Tensor,
    terms: torch.Tensor,
    dbetas: Sequence[torch.Tensor] | None,
    dgammas: Sequence[torch.Tensor] | None,
    dbiases: Sequence[torch.Tensor] | None,
    dreduce: torch.Tensor,
    dselects: Sequence[torch.Tensor],
    dselect_biases: Sequence[torch.Tensor] | None,
    *,
    batch_norms: Sequence[bool],
    values: int,
    has_norm: bool,
) -> Launch:
    """Write the gradients of all parameters but the convolutions' weights.

    From `dh`, `s`, `z`, `dlogits`, `attention`, `pooled_grad` as `gate_train` and `gate_train_bwd` write them,
    `grads [2, N, M, C]`, the sums over pixels of `select_bwd`, and `sums [2, N, M, C]`, those of `pooled_moments_fwd`,
    or None where every pixel is active and no branch has a norm; `rstd` and `gamma` `[M, C]`; fp32, contiguous.

    Written: `affine_grad [2, M, C]`, of beta then of gamma; `terms [2, M, C]`, the same over the number of `values` for
    branches of `batch_norms`, 0 for others; fp32. Of any dtype: M `dbetas`, `dgammas` and `dbiases` `[C]` of norms and
    convolutions, the first two with `has_norm`; `dreduce [D, C]`, M `dselects [C, D]`, M `dselect_biases [C]`; None
    where there are none.
    """
    n, m, c = attention.shape
    d = dh.shape[1]
    active, pooled = grads.unbind(0) if sums is None else sums.unbind(0)
    # Where a gradient is not wanted, another copy of it may be overwritten by the same values, or nothing is written.
    betas, gammas = (grad.unbind(0) for grad in affine_grad.unbind(0))
    arguments = (
        dh, s, z, dlogits, attention, pooled_grad, *grads.unbind(0), active, pooled, rstd, gamma, affine_grad, terms,
        betas if dbetas is None else tuple(dbetas), gammas if dgammas is None else tuple(dgammas),
        betas if dbiases is None else tuple(dbiases), dreduce, tuple(dselects),
        betas if dselect_biases is None else tuple(dselect_biases),
        n, c, d, values // n, sum(is_batch << i for i, is_batch in enumerate(batch_norms)), 1.0 / values,
    )  # fmt: skip
    constexprs = {
        "M": m,
        "BLOCK_N": BLOCK_SAMPLES,
        "BLOCK_C": BLOCK_CHANNELS,
        "BLOCK_D": block_d(d),
        "HAS_ACTIVE": sums is not None,
        "HAS_NORM": has_norm,
        "HAS_BIAS": dbiases is not None,
        "HAS_SELECT_BIAS": dselect_biases is not None,
    }
    grid = (cdiv(c, BLOCK_CHANNELS), m + 1, cdiv(d, block_d(d)))
    trips = (cdiv(n, BLOCK_SAMPLES),) * 2
    return Launch(gate_params_bwd_kernel, grid, arguments, constexprs, {"num_warps": 4}, trips)
