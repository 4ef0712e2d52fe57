"""The interpreter as the other tests use it."""

import pytest
import torch
import triton
import triton.language as tl

from .interpreter import checked_overflow

pytestmark = pytest.mark.interpret


@triton.jit
def square(x_ptr, out_ptr):
    x = tl.load(x_ptr)
    tl.store(out_ptr, x * x)


def test_overflow_is_an_error_where_it_is_looked_for():
    x, out = torch.tensor([2**20], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    square[(1,)](x, out)
    with checked_overflow():
        square[(1,)](torch.tensor([2], dtype=torch.int32), out)
        assert out.item() == 4
        with pytest.raises(Exception, match="overflow"):
            square[(1,)](x, out)
