"""What PyTorch's profiler sees a device do in a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def device_events(call: Callable[[], object], device: torch.device) -> list[Any]:
    """The profiler's events of kernels, copies and fills on a GPU in one call, which is awaited."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
