"""Weights of the backward kernels packed by PyTorch's operators."""

from sk_triton.kernels.grad_geometry import grad_weight_order
from sk_triton.kernels.packing import gathered


def pack_grad_weights(weights, shape, config, dtype):
    """What `gather.grad_weight_launch` packs."""
    return gathered(weights, *grad_weight_order(shape, config, weights[0].dtype, weights[0].device), dtype)
