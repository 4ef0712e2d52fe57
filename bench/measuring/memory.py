"""Memory of one call: the most bytes of tensors alive, and what training keeps for the backward pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .. import results


def measure_memory(
    call: Callable[[], object], device: torch.device, keep: list[Tensor], sees_saved: bool = True
) -> results.Memory:
    """Memory of one warmed-up `call` beyond `keep`, its input and parameters; of earlier calls nothing may be left.

    The peak is the allocator's own, what libraries take of it for themselves included. Without `sees_saved` it is not
    asked what autograd keeps.
    """
    saved = _Saved(keep) if sees_saved else contextlib.nullcontext(None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with saved:
            call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with saved:
            peak = _allocated_peak(call)
    return results.Memory(peak, saved.bytes or None if isinstance(saved, _Saved) else None)


def kept_for_backward(v: Tensor, keep: list[Tensor]) -> int:
    """Bytes that the graph behind `v`, one of ``torch.compile``, keeps for the backward pass beyond `keep`.

    The graph is asked itself: under ``saved_tensors_hooks`` compiled code would be traced anew.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in keep}
    nodes, seen, total = [v.grad_fn], set(), 0
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(parent for parent, _ in node.next_functions)
        # Newer releases keep what needs no version check apart.
        for tensor in (*getattr(node, "saved_tensors", ()), *getattr(node, "_tensors_no_vc_check", ())):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def _allocated_peak(call: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at a time during `call`, beyond those before.

    By its profiler: a dispatch mode would not see what operators allocate inside, and layers go other ways under one.
    Memory of before that the call frees, and what other Python threads take, are not seen.
    """
    # Else it writes to stderr that it starts and stops, and that there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result  # alive until all of the call's own are counted
    kineto: Any = profiled.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the storages that autograd keeps for the backward pass, parameters and input left out."""

    def __init__(self, keep: list[Tensor]) -> None:
        known = {tensor.untyped_storage().data_ptr() for tensor in keep}
        self.bytes = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)
