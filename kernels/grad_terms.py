"""What the branches' gradients are made of: six numbers for each sample, branch and channel, computed once."""

import torch
import triton
import triton.language as tl

from .geometry import cdiv
from .launch import Launch

BLOCK_C = 128


@triton.jit
def grad_terms_kernel(
    attention_ptr, pooled_grad_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, dbeta_ptr, dgamma_ptr, terms_ptr,
    C, M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one sample and branch, a row of the attention."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    offs_m = row % M * C + c
    gain = tl.load(attention_ptr + row * C + c, mask=mask, other=0.0)
    lift = tl.load(pooled_grad_ptr + row // M * C + c, mask=mask, other=0.0)
    if HAS_NORM:
        mean = tl.load(mean_ptr + offs_m, mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask, other=0.0)
        gamma = tl.load(gamma_ptr + offs_m, mask=mask, other=0.0)
        beta = tl.load(beta_ptr + offs_m, mask=mask, other=0.0)
        dbeta = tl.load(dbeta_ptr + offs_m, mask=mask, other=0.0)
        dgamma = tl.load(dgamma_ptr + offs_m, mask=mask, other=0.0)
        scale = gamma * rstd
        away = scale * rstd * dgamma
        terms_ptr += (row * C + c) * 6
        tl.store(terms_ptr, scale * gain, mask=mask)
        tl.store(terms_ptr + 1, scale * lift, mask=mask)
        tl.store(terms_ptr + 2, scale, mask=mask)
        tl.store(terms_ptr + 3, beta - mean * scale, mask=mask)
        tl.store(terms_ptr + 4, -away, mask=mask)
        tl.store(terms_ptr + 5, away * mean - scale * dbeta, mask=mask)
    else:
        terms_ptr += (row * C + c) * 2
        tl.store(terms_ptr, gain, mask=mask)
        tl.store(terms_ptr + 1, lift, mask=mask)


def grad_terms(
    attention: torch.Tensor,
    pooled_grad: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    dbeta: torch.Tensor,
    dgamma: torch.Tensor,
    terms: torch.Tensor,
    *,
    has_norm: bool,
) -> Launch:
    """Write `terms [N, M, C, 6]`: gain, lift, scale, shift, slope and level of `branch_grad.branch_grad`; without norm
    `[N, M, C, 2]`, gain and lift.

    `attention [N, M, C]`, `pooled_grad [N, C]`; `mean`, `rstd`, `gamma`, `beta` of the norms and `dbeta`, `dgamma`,
    their gradients over the number of values, `[M, C]`; all fp32, contiguous.
    """
    n, m, c = attention.shape
    arguments = (attention, pooled_grad, mean, rstd, gamma, beta, dbeta, dgamma, terms, c)
    constexprs = {"M": m, "BLOCK_C": BLOCK_C, "HAS_NORM": has_norm}
    return Launch(grad_terms_kernel, (n * m, cdiv(c, BLOCK_C)), arguments, constexprs, {"num_warps": 1})
