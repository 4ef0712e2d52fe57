"""Tensors that outlive the call which makes them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


def lasting(build: Callable[[], T], device: torch.device) -> T:
    """What `build` makes on `device`, to be kept for later calls.

    None of its tensors belongs to inference mode or to a dispatch mode. Nor, on a GPU, to a memory pool of this
    thread's: CUDA graphs of ``torch.compile(mode="reduce-overhead")`` reuse all memory that was allocated while they
    were warmed up.

    Raises:
        RuntimeError: a CUDA graph is being captured, to which such memory cannot belong.
    """
    if is_capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, but the layer's weights are not packed or its tables not on the GPU: "
            "call the layer once on such an input before the capture"
        )

    def build_plainly() -> T:
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            return build()

    if device.type != "cuda":
        return build_plainly()
    stream = torch.cuda.current_stream(device)

    def build_on_stream() -> T:
        with torch.cuda.stream(stream):
            return build_plainly()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(build_on_stream).result()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
