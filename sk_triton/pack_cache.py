"""What parameters were packed into, kept from call to call, and never served stale."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .kernels.lasting import is_capturing, lasting
from .optimizer_steps import sharded_steps, watch_optimizers
from .packed import Packed
from .params import Branch, Gate, are_kept, norms_of, slots_of

T = TypeVar("T")


Fingerprint = list[Hashable]


def fingerprint(tensors: Sequence[Tensor]) -> Fingerprint:
    """Tells these tensors, as long as their memory is alive, from all others and from themselves after a change.

    Only of tensors with a version counter, which inference tensors lack.
    """
    return [sharded_steps(), *((t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in tensors)]


class _Entry(NamedTuple):
    fingerprint: Fingerprint
    sources: tuple[Tensor, ...]
    packed: Any
    stream: torch.cuda.Stream | None


class PackCache:
    """What a layer's parameters were packed into, with the means to tell that they have changed since.

    An entry is used only while every source tensor has the address, version counter, dtype, shape and strides it was
    packed from; the entry keeps the sources' memory alive, so that an address cannot be reused. In-place updates,
    optimizers (:mod:`.optimizer_steps`), ``load_state_dict``, ``.to()`` and assignments to ``.data`` are all seen.
    Another write that PyTorch itself does not count (``p.data.add_(1)``, a collective, a NumPy view, a replayed CUDA
    graph, another process) is not: switch the layer to ``train()`` and back after it.

    A CUDA graph keeps the packed weights it was captured with, and those stay alive as long as the cache.

    A deep copy or a pickle of a cache is empty.

    Args:
        keeps_sources: False where whoever owns the cache sees to it that addresses are not reused.
        takes_computed: False if :func:`remember` is to keep nothing of tensors that are no parameters or statistics.
    """

    def __init__(self, keeps_sources: bool = True, takes_computed: bool = True) -> None:
        self._keeps_sources = keeps_sources
        self.takes_computed = takes_computed
        self._entries: dict[Hashable, _Entry] = {}
        self._captured: list[Packed] = []

    def clear(self) -> None:
        """Forget everything but what a CUDA graph has captured."""
        self._entries = {}

    def get(
        self,
        key: Hashable,
        sources: Sequence[Tensor],
        build: Callable[[], T],
        is_lasting: Callable[[], bool] = lambda: True,
    ) -> T:
        """The entry under `key` if `sources` are unchanged, else a new one from `build`, kept if `is_lasting`.

        Raises:
            RuntimeError: a CUDA graph is being captured and there is no entry for it. Of inference tensors there never
                is; the graph packs them, at every replay.
        """
        if any(t.is_inference() for t in sources):  # they have no version counter
            return build()
        found = fingerprint(sources)
        entry = self._entries.get(key)
        if entry is None or entry.fingerprint != found:
            return self._add(key, sources, found, build) if is_lasting() else build()
        if sources[0].is_cuda:
            self._use_on_current_stream(entry, sources[0].device)
        return entry.packed

    def _add(self, key: Hashable, sources: Sequence[Tensor], found: Fingerprint, build: Callable[[], T]) -> T:
        watch_optimizers(sources)
        packed = lasting(build, sources[0].device)
        stream = None
        if sources[0].is_cuda:
            stream = torch.cuda.current_stream(sources[0].device)
            stream.synchronize()  # once per update: later calls may come from any stream
        fresh = {k: e for k, e in self._entries.items() if e.fingerprint == found}
        kept = tuple(t.detach() for t in sources) if self._keeps_sources else ()
        fresh[key] = _Entry(found, kept, packed, stream)
        self._entries = fresh
        return packed

    def _use_on_current_stream(self, entry: _Entry, device: torch.device) -> None:
        """Keep the entry's memory from being reused while this stream, or a graph captured on it, still reads it."""
        stream = torch.cuda.current_stream(device)
        if is_capturing(device):
            if not any(packed is entry.packed for packed in self._captured):
                self._captured.append(entry.packed)
        elif stream != entry.stream:
            for tensor in entry.packed.tensors():
                tensor.record_stream(stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackCache:
        return PackCache(self._keeps_sources, self.takes_computed)

    def __reduce__(self) -> tuple[type[PackCache], tuple[bool, bool]]:
        return PackCache, (self._keeps_sources, self.takes_computed)


_shared: dict[Hashable, tuple[list[StorageWeakRef], PackCache]] = {}


def shared_cache(tensors: Sequence[Tensor]) -> PackCache:
    """The cache of the unit with these parameters and buffers, for operators, which know no layer.

    It lives until another unit comes after their memory has gone, so no CUDA graph may capture what it holds.
    """
    storages = [t.untyped_storage() for t in tensors]
    key = tuple([(storage._cdata, t.storage_offset()) for storage, t in zip(storages, tensors, strict=True)])
    entry = _shared.get(key)
    if entry is None:
        for other, (references, _) in list(_shared.items()):
            if any(reference.expired() for reference in references):
                _shared.pop(other, None)
        # A weak reference keeps a storage's number, not its memory: no other storage gets that number.
        entry = [StorageWeakRef(storage) for storage in storages], PackCache(keeps_sources=False)
        _shared[key] = entry
    return entry[1]


def forget_shared() -> None:
    """Clear all shared caches."""
    for _, cache in list(_shared.values()):
        cache.clear()


def remember(
    cache: PackCache | None, key: Hashable, branches: Sequence[Branch], gate: Gate, build: Callable[[], T]
) -> T:
    """What `build` makes of a unit's parameters, from `cache` where they are unchanged; without one, made anew."""
    if cache is None:
        return build()
    epsilons = tuple([getattr(norm, "eps", None) for norm in norms_of(branches, gate)])
    slots = slots_of(branches, gate)
    filled = tuple([tensor is not None for tensor in slots])
    sources = [tensor for tensor in slots if tensor is not None]
    return cache.get(
        (key, epsilons, filled), sources, build, lambda: cache.takes_computed or are_kept(branches, gate)
    )
