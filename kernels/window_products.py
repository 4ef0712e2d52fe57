"""Products of a window of rows with the weights of its taps: dense, or without the zeros of narrow groups."""

import triton
import triton.language as tl

from .sparse_product import accumulated, sparse_product

# Pixels whose sparse products run side by side: what is done with them then runs beside the next ones'.
SPARSE_AT_ONCE = tl.constexpr(4)


@triton.jit
def window_outputs(
    operands, taps, start, PLACES: tl.constexpr, FIRST: tl.constexpr, RUN_W: tl.constexpr,
):  # fmt: skip
    """Every lane's RUN_W output pixels, before their activation: tensors `[BLOCKS, 16, lanes]`. `PLACES[FIRST + i]` is
    the operand that tap i meets for the first of them.

    Tap by tap, so that products that wait for one another are RUN_W apart.
    """
    outputs = ()
    for _ in tl.static_range(RUN_W):
        outputs = outputs + (start,)
    for i in tl.static_range(len(taps)):
        added = ()
        for s in tl.static_range(RUN_W):
            added = added + (tl.dot(taps[i], operands[PLACES[FIRST + i] + s], outputs[s]),)
        outputs = added
    return outputs


@triton.jit
def sparse_outputs(
    operands, taps, start, metadata, dtype: tl.constexpr, IS_CROSSED: tl.constexpr,
    PLACES: tl.constexpr, PARTNERS: tl.constexpr, FIRST: tl.constexpr, RUN_W: tl.constexpr,
):  # fmt: skip
    """As `window_outputs`, of what `sparse_product` takes; `PARTNERS[FIRST + i]` as `window_geometry.partners` says."""
    outputs = ()
    for s in tl.static_range(0, RUN_W, SPARSE_AT_ONCE):
        added = ()
        for _ in tl.static_range(min(SPARSE_AT_ONCE, RUN_W - s)):
            added = added + (start,)
        for i in tl.static_range(len(taps)):
            if PARTNERS[FIRST + i] != i:
                added = _add_tap(added, operands, taps, metadata, dtype, PLACES, PARTNERS, FIRST, i, s)
        for i in tl.static_range(len(added)):
            outputs = outputs + (accumulated(added[i], IS_CROSSED),)
    return outputs


@triton.jit
def _add_tap(
    outputs, operands, taps, metadata, dtype: tl.constexpr,
    PLACES: tl.constexpr, PARTNERS: tl.constexpr, FIRST: tl.constexpr, TAP: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """`outputs` of adjacent pixels, from the S-th on, and the products of a tap, and of its partner if it has one."""
    PARTNER: tl.constexpr = PARTNERS[FIRST + TAP]
    added = ()
    for s in tl.static_range(len(outputs)):
        right = operands[PLACES[FIRST + TAP] + S + s]
        if PARTNER >= 0:
            right = right + operands[PLACES[FIRST + PARTNER] + S + s]
            product = sparse_product(taps[TAP] + taps[PARTNER], right, outputs[s], metadata, dtype)
        else:
            product = sparse_product(taps[TAP], right, outputs[s], metadata, dtype)
        added = added + (product,)
    return added
