"""The interpreter as the other tests use it."""

import contextlib

import pytest
import torch
import triton
import triton.language as tl

from . import interpreter
from .interpreter import checked_overflow

pytestmark = [pytest.mark.interpret, pytest.mark.interpreter_only]


@triton.jit
def square(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, x * x)


@triton.jit
def scaled(x, by):
    return x * by


@triton.jit
def mixed(x_ptr, i_ptr, out_ptrs, M: tl.constexpr, N: tl.constexpr):
    """Operands of equal and unequal types, shapes and ranks, numbers that only their type or sign tells apart."""
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    offs = rows[:, None] * N + columns[None, :]
    x = tl.load(x_ptr + offs)
    i = tl.load(i_ptr + offs, mask=(offs < M * N - 3) & (columns > 0), other=1)
    for k in range(2):
        product = tl.dot(x.to(tl.float32), tl.trans(x).to(tl.float32))
        wide = x.to(tl.float32) * 0.0 + x * -0.0 + scaled(x, 1) + scaled(x, 1.0) + k
        whole = i * 1 + i.to(tl.int64) + columns - k
        tl.store(out_ptrs[0] + offs, 2 * wide - tl.sum(wide, axis=1)[:, None] / 3)
        tl.store(out_ptrs[1] + offs, 1.0 / (x * -0.0))
        tl.store(out_ptrs[2] + offs, whole // 3 + (whole % 5 << 1) + (i.to(tl.uint8) >> 1) + (i > 2))
        tl.store(out_ptrs[3] + offs, tl.where(x > 0, tl.maximum(x, 0.5), -x) + product.to(x.dtype))
        tl.store(out_ptrs[4] + offs, x.to(tl.bfloat16) + x)
        tl.store(out_ptrs[5] + offs, x.to(tl.float16, bitcast=False) + k / 2)


@triton.jit
def unlike(out_ptr, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    tl.store(out_ptr + rows, rows + rows)
    tl.store(out_ptr + rows, rows + columns)


def test_overflow_is_an_error_where_it_is_looked_for():
    x, out = torch.tensor([2**20], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    square[(1,)](x, out)
    with checked_overflow():
        square[(1,)](torch.tensor([2], dtype=torch.int32), out)
        assert out.item() == 4
        with pytest.raises(Exception, match="overflow"):
            square[(1,)](x, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("whole", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_types_worked_out_once_give_the_same_bits(dtype, whole, monkeypatch):
    x = torch.randn(16, 16).to(dtype)
    i = torch.arange(256).reshape(16, 16).to(whole)
    of = (torch.float32, dtype, torch.int64, dtype, torch.float32, torch.float32)

    def run():
        outs = tuple(torch.full((16, 16), 7, dtype=dtype) for dtype in of)
        mixed[(2,)](x, i, outs, 16, 16)
        return outs

    quick = run()
    monkeypatch.setattr(interpreter, "remembered", contextlib.nullcontext)
    for ours, theirs in zip(quick, run(), strict=True):
        assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))


def test_types_that_do_not_match_are_an_error_after_ones_that_did():
    with pytest.raises(Exception, match="incompatible dimensions"):
        unlike[(1,)](torch.zeros(16, dtype=torch.int32), 16, 32)
