"""Weight gradients from the partial sums that the programs of a backward launch left, added in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("TERMS", "ENTRIES"))
def branch_grad_reduce_kernel(
    partial_ptr, dw_ptr,
    TERMS, ENTRIES, GROUPS, stride_term, stride_co, stride_ci, stride_ky, stride_kx,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, TAPS_BEFORE: tl.constexpr, STRIDE_BLOCK: tl.constexpr,
    GROUPS_PER_BLOCK: tl.constexpr, GROUP_CI: tl.constexpr, GROUP_CO: tl.constexpr,
    BLOCK_CO: tl.constexpr, CHUNKS_CO: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_E entries of one branch: the sum over `partial [TERMS, blocks, taps, BLOCK_CO, GROUP_CI]`."""
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    ci = entry % GROUP_CI
    channel = entry // GROUP_CI % BLOCK_CO
    tap = entry // (GROUP_CI * BLOCK_CO) % TAPS
    block = entry // (GROUP_CI * BLOCK_CO * TAPS)
    in_block = block % CHUNKS_CO * BLOCK_CO + channel
    co = block // CHUNKS_CO * (GROUPS_PER_BLOCK * GROUP_CO) + in_block
    mask = (in_block < GROUPS_PER_BLOCK * GROUP_CO) & (co < GROUPS * GROUP_CO) & (entry < ENTRIES)
    offs = block * STRIDE_BLOCK + ((TAPS_BEFORE + tap) * BLOCK_CO + channel) * GROUP_CI + ci
    acc = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, TERMS, BLOCK_T):
        term = first + tl.arange(0, BLOCK_T)
        terms = tl.load(
            partial_ptr + term.to(tl.int64)[:, None] * stride_term + offs[None, :],
            mask=(term < TERMS)[:, None] & mask[None, :],
            other=0.0,
        )
        acc += tl.sum(terms, axis=0)
    offs = co * stride_co + ci * stride_ci + tap // KERNEL * stride_ky + tap % KERNEL * stride_kx
    tl.store(dw_ptr + offs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
