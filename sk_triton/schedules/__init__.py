"""Orders in which a unit is computed, by the kernels or, `cpu_*`, by PyTorch's operators; none imports another.

The kernels' schedule "train" is a package of its own, :mod:`sk_triton.training`.
"""
