"""Launches run by the interpreter, each allowed its own tensors alone."""

import contextlib
import math

import torch

from sk_triton.bench.interpreted.meter import Meter
from sk_triton.kernels.launch import flat

from .interpreter import exact_bfloat16

# Of all of a launch's tensors: larger ones take too long to watch.
MAX_BYTES = 2**22


def run_watched(launch):
    """Run a launch, rounding to bfloat16 as a GPU does; an access outside of its tensors raises, if they are small."""
    tensors = [t for t in flat(launch.arguments) if isinstance(t, torch.Tensor)]
    with contextlib.ExitStack() as stack:
        if any(t.dtype == torch.bfloat16 for t in tensors):
            stack.enter_context(exact_bfloat16())
        if sum(t.untyped_storage().nbytes() for t in tensors) < MAX_BYTES:
            stack.enter_context(Meter({str(i): t for i, t in enumerate(tensors)}).watch())
        launch()


def run_allowing(launch, **tensors):
    """As `run_watched`, where these tensors alone may be accessed."""
    with contextlib.ExitStack() as stack:
        if next(iter(tensors.values())).dtype == torch.bfloat16:
            stack.enter_context(exact_bfloat16())
        stack.enter_context(Meter(tensors).watch())
        launch()


def nans(*size):
    return torch.full(size, math.nan)
