"""Turns off gradients and autocast around kernels that an operator or an autograd function starts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def undisturbed(x: Tensor) -> Iterator[None]:
    """On the device of x, without gradients or autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(x.device.type):
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if x.is_cuda:
            stack.enter_context(torch.cuda.device_of(x))
        yield
