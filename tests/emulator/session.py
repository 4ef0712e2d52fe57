"""The emulator in the place of Triton's interpreter."""

import contextlib

import pytest
import torch

from sk_triton import dispatch
from sk_triton.bench.interpreted import meter
from sk_triton.kernels import branch_conv_window, branch_grad, merged_conv_window
from sk_triton.kernels.launch import Launch
from sk_triton.kernels.prefetch import can_prefetch

from .launching import emulate
from .memory import observed_accesses

PREFETCHING = (branch_conv_window, branch_grad, merged_conv_window)


@contextlib.contextmanager
def emulating(chip):
    """Inside, launches of tensors on the CPU run by the code for a chip. The dispatcher lets them through as it does
    for the interpreter, the meter counts their accesses, and they fetch ahead as on a GPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "__call__", lambda launch: emulate(launch, chip))
        patched.setattr(dispatch, "is_interpreted", lambda: True)
        patched.setattr(meter, "observed_accesses", observed_accesses)
        for module in PREFETCHING:
            patched.setattr(module, "can_prefetch", _can_prefetch_on_a_gpu)
        yield


def _can_prefetch_on_a_gpu(x):
    alike = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return can_prefetch(alike) and x.data_ptr() % 16 == 0
