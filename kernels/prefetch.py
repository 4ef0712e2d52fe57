"""Memory fetched into L1 or L2 ahead of the loads that want it, on NVIDIA's chips."""

import torch
import triton
import triton.language as tl


@triton.jit
def prefetch_l1(ptrs, is_wanted):
    """Ask for the sector of 32 bytes at each of `ptrs` where `is_wanted` (of each, or all). A hint: nothing waits for
    it, and no register holds it (PTX `prefetch.global.L1`). Sectors of one line that neighbouring threads ask for are
    one request to L2.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.u32 p, $2, 0;
        @p prefetch.global.L1 [$1];
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptrs.to(tl.int64, bitcast=True), tl.broadcast_to(is_wanted.to(tl.int32), ptrs.shape)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_l2(ptr, size, is_wanted):
    """Ask for `size` bytes from `ptr` on, if `is_wanted` (all scalars; both multiples of 16). A hint: nothing waits for
    it, no register holds it, and one thread of the program gives it (PTX `cp.async.bulk.prefetch`).
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 p, thread, 0;
        setp.ne.and.u32 p, $3, 0, p;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r",
        [ptr.to(tl.int64, bitcast=True), size.to(tl.int32), is_wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_pixels(image_ptr, y, x, H, W, stride_h, stride_w, is_wanted, PIXELS: tl.constexpr):
    """`prefetch_l2` of PIXELS pixels of row y from x on, all channels, as far as they lie in the image."""
    start = tl.maximum(x, 0)
    size = (
        (tl.minimum(x + PIXELS, W) - start) * stride_w * (image_ptr.dtype.element_ty.primitive_bitwidth // 8)
    )
    ptr = image_ptr + (y * tl.cast(stride_h, tl.int64) + start * stride_w)
    prefetch_l2(ptr, size, is_wanted & (y >= 0) & (y < H))


def can_prefetch(x: torch.Tensor) -> bool:
    """Whether `x [N, C, H, W]` can be: its pixels lie dense and aligned; the interpreter has no caches."""
    is_dense = x.stride(3) == x.shape[1]
    is_aligned = x.data_ptr() % 16 == 0 and all(x.stride(i) * x.element_size() % 16 == 0 for i in (0, 2, 3))
    return is_dense and is_aligned and x.device.type != "cpu"
