"""What older Tritons cannot do; refused there by the plan with the same reasons."""

import pytest

from sk_triton.chips import NARROW_PRODUCTS, UNHOISTED_LOOPS
from sk_triton.environment import triton_version

HAS_NARROW_PRODUCTS = triton_version() >= NARROW_PRODUCTS
HAS_UNHOISTED_LOOPS = triton_version() >= UNHOISTED_LOOPS
# Configs are chosen so that this Triton's kernels do not spill; older ones spill a few values on some chips.
IS_CONFIGURED_FOR = triton_version() >= (3, 9)
MAX_SPILLS = 0 if IS_CONFIGURED_FOR else 8

needs_narrow_products = pytest.mark.skipif(
    not HAS_NARROW_PRODUCTS,
    reason="kernels with products of 8 columns compile from Triton 3.6 on: kernels/README.md",
)
needs_unhoisted_loops = pytest.mark.skipif(
    not HAS_UNHOISTED_LOOPS,
    reason="before Triton 3.6 the resident kernel spills: kernels/README.md",
)

needs_configured_compiler = pytest.mark.skipif(
    not IS_CONFIGURED_FOR,
    reason="configs are chosen so that Triton 3.9 does not spill: kernels/README.md",
)

needs_predicting_compiler = pytest.mark.skipif(
    triton_version() != (3, 9),
    reason="the README's predictions are of the instructions that Triton 3.9 makes",
)
