"""What launches pack, by PyTorch's operators."""

import torch

from sk_triton.kernels.grad_geometry import grad_weight_order
from sk_triton.kernels.merging import lattice_taps, merged_shape, sections, widen_kernel
from sk_triton.kernels.weight_orders import branch_weight_order


def pack_branch_weights(weights, shape, config, dtype):
    """What `gather.branch_weight_launch` packs."""
    first = weights[0]
    return gathered(weights, *branch_weight_order(shape, config, dtype, first.dtype, first.device), dtype)


def pack_grad_weights(weights, shape, config, dtype):
    """What `gather.grad_weight_launch` packs."""
    return gathered(weights, *grad_weight_order(shape, config, weights[0].dtype, weights[0].device), dtype)


def gathered(weights, index, end, dtype):
    source = torch.cat([*(weight.reshape(-1) for weight in weights), end])
    return source.to(dtype).index_select(0, index)


def sum_by_sections(weights, scale, branches, h, w):
    """What `section_weights.section_weights` writes for an `h` x `w` input. `scale [M, C_out]`."""
    merged = merged_shape(branches)
    k = merged.kernels[0]
    total = 0
    for weight, taps, factor in zip(weights, lattice_taps(branches), scale, strict=True):
        total += widen_kernel(weight.double(), taps, k) * factor.double()[:, None, None, None]

    def incidence(size):
        return torch.tensor(
            [[float(t in section.taps) for t in range(k)] for section in sections(merged, size)]
        )

    met = torch.einsum("ap,bq,oipq->aboi", incidence(h).double(), incidence(w).double(), total)
    # [a, b, C_out / groups, groups, C_in / groups]
    met = met.unflatten(2, (branches.groups, -1)).permute(0, 1, 3, 2, 4)
    return met.flatten(3).float()
