"""Memory of one call: the most bytes of tensors alive, and what training keeps for the backward pass."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .. import results


def measure_memory(
    call: Callable[[], object], device: torch.device, keep: list[Tensor], sees_saved: bool = True
) -> results.Memory:
    """Memory of one warmed-up `call` beyond `keep`, its input and parameters; of earlier calls nothing may be left.

    On a GPU the allocator's own peak, workspaces of libraries included; on the CPU the storages of all tensors that
    operators return. Without `sees_saved` it is not asked what autograd keeps.
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
        tracker = _Tracker(keep)
        with tracker, saved:
            call()
        peak = tracker.peak
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


class _Tracker(TorchDispatchMode):
    """Adds up the storages that operators make while they live."""

    def __init__(self, keep: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in keep}
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.known or not size:
            return
        self.known.add(address)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


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
