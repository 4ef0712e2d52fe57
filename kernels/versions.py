"""Triton's version, where kernels depend on how it lays out tensors or what it compiles."""

import triton

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
