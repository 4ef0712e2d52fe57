"""Parameters in the form a schedule reads, and the cache that never serves a stale copy of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .folding import fold_norm
from .kernels.config import WindowConfig
from .kernels.geometry import blocking
from .kernels.lasting import lasting
from .kernels.merging import column_sections, section_weights, strips, widen_kernel
from .kernels.packing import pack_branch_weights
from .params import Branch, Gate, norms_of, tensors_of
from .plan import BranchLaunch, MergedLaunch, Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """A unit's parameters, packed for one plan.

    Attributes:
        weights: one flat tensor for each branch launch of the plan, norms folded in; for schedule "library" one for
            each branch, ``[C, C_branch_in / groups, k, k]`` in channels_last.
        shifts: ``[M, C]`` fp32 for each branch launch, or None where nothing is added; for "library" one for all.
        reduce_weight, gate_scale, gate_shift: ``[d, C]``, ``[d]``, ``[d]``: ``z = act((W1 s) * scale + shift)``.
        select_weight, select_bias: ``[M, C, d]``, and ``[M, C]`` fp32 or None.
        calls: what starts the kernels of operators' calls on these parameters again, by kind of call.
    """

    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor | None, ...]
    reduce_weight: Tensor
    gate_scale: Tensor
    gate_shift: Tensor
    select_weight: Tensor
    select_bias: Tensor | None
    calls: dict[Hashable, Callable[[Tensor], Tensor]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    @property
    def gate(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The gate's parameters, in the order in which kernels take them."""
        return self.reduce_weight, self.gate_scale, self.gate_shift, self.select_weight, self.select_bias

    def tensors(self) -> list[Tensor]:
        """All of them, without the absent ones."""
        return [t for t in (*self.weights, *self.shifts, *self.gate) if t is not None]


Fingerprint = list[tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]]


def fingerprint(tensors: Sequence[Tensor]) -> Fingerprint:
    """Tells these tensors, as long as their memory is alive, from all others and from themselves after a change.

    Only of tensors with a version counter, which inference tensors lack.
    """
    return [(t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in tensors]


class _Entry(NamedTuple):
    fingerprint: Fingerprint
    sources: tuple[Tensor, ...]
    packed: Any
    stream: torch.cuda.Stream | None


class PackCache:
    """What a layer's parameters were packed into, with the means to tell that they have changed since.

    An entry is used only while every source tensor has the address, version counter, dtype, shape and strides it was
    packed from; the entry keeps the sources' memory alive, so that an address cannot be reused. In-place updates,
    ``load_state_dict``, ``.to()`` and assignments to ``.data`` are all seen. A write that PyTorch itself does not count
    (``p.data.add_(1)``, a NumPy view, a replayed CUDA graph, another process) is not: switch the layer to ``train()``
    and back after it.

    A CUDA graph keeps the packed weights it was captured with, and those stay alive as long as the cache.

    A deep copy or a pickle of a cache is empty.

    Args:
        keeps_sources: False where whoever owns the cache sees to it that addresses are not reused.
    """

    def __init__(self, keeps_sources: bool = True) -> None:
        self._keeps_sources = keeps_sources
        self._entries: dict[Hashable, _Entry] = {}
        self._captured: list[Packed] = []

    def clear(self) -> None:
        """Forget everything but what a CUDA graph has captured."""
        self._entries = {}

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph has captured packed weights."""
        return bool(self._captured)

    def get(self, key: Hashable, sources: Sequence[Tensor], build: Callable[[], T]) -> T:
        """The entry under `key` if `sources` are unchanged, else a new one from `build`.

        Raises:
            RuntimeError: a CUDA graph is being captured and there is no entry to capture.
        """
        # Inference tensors have no version counter.
        is_counted = not any(t.is_inference() for t in sources)
        found: Fingerprint = []
        if is_counted:
            found = fingerprint(sources)
            entry = self._entries.get(key)
            if entry is not None and entry.fingerprint == found:
                if sources[0].is_cuda:
                    self._use_on_current_stream(entry)
                return entry.packed
        if _is_capturing(sources[0]):
            raise RuntimeError(
                "a CUDA graph is being captured and the layer's weights are not packed: "
                "call the layer once on such an input before the capture"
            )
        if not is_counted:
            return build()
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

    def _use_on_current_stream(self, entry: _Entry) -> None:
        """Keep the entry's memory from being reused while this stream, or a graph captured on it, still reads it."""
        stream = torch.cuda.current_stream(entry.packed.gate_scale.device)
        if _is_capturing(entry.packed.gate_scale):
            if not any(packed is entry.packed for packed in self._captured):
                self._captured.append(entry.packed)
        elif stream != entry.stream:
            for tensor in entry.packed.tensors():
                tensor.record_stream(stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackCache:
        return PackCache()

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        return PackCache, ()


_shared: dict[Hashable, tuple[list[StorageWeakRef], PackCache]] = {}


def shared_cache(tensors: Sequence[Tensor]) -> PackCache:
    """The cache of the unit with these parameters and buffers, for operators, which know no layer.

    It lives until another unit comes after their memory has gone; what a CUDA graph has captured of it lives for good.
    """
    storages = [t.untyped_storage() for t in tensors]
    key = tuple([(storage._cdata, t.storage_offset()) for storage, t in zip(storages, tensors, strict=True)])
    entry = _shared.get(key)
    if entry is None:
        for other, (references, cache) in list(_shared.items()):
            if not cache.is_captured and any(reference.expired() for reference in references):
                _shared.pop(other, None)
        # A weak reference keeps a storage's number, not its memory: no other storage gets that number.
        entry = [StorageWeakRef(storage) for storage in storages], PackCache(keeps_sources=False)
        _shared[key] = entry
    return entry[1]


def forget_shared() -> None:
    """Clear all shared caches."""
    for _, cache in list(_shared.values()):
        cache.clear()


def pack(
    plan: Plan, h: int, w: int, branches: Sequence[Branch], gate: Gate, cache: PackCache | None
) -> Packed:
    """Parameters packed for `plan` on inputs of `h` x `w` pixels, from `cache` where they are unchanged."""
    merged = plan.merged_launch
    if merged is not None:
        conv = merged.conv
        shape = merged.branches if isinstance(conv, WindowConfig) else merged.shape
        blocks = blocking(shape, conv).blocks
        fields = (type(conv), conv.BLOCK_CI, conv.BLOCK_CO, conv.RUN_W, blocks, merged.border.ROWS)
        key = (plan.dtype, merged.branches, fields, h, w)
        return remember(cache, key, branches, gate, lambda: _pack_merged(plan, merged, h, w, branches, gate))
    if plan.schedule == "library":
        whole = (plan.dtype, plan.schedule)
        return remember(cache, whole, branches, gate, lambda: _pack_library(plan, branches, gate))
    layouts = tuple([_layout(launch) for launch in plan.branch_launches])
    return remember(cache, (plan.dtype, layouts), branches, gate, lambda: _pack(plan, branches, gate))


def remember(
    cache: PackCache | None, key: Hashable, branches: Sequence[Branch], gate: Gate, build: Callable[[], T]
) -> T:
    """What `build` makes of a unit's parameters, from `cache` where they are unchanged; without one, made anew."""
    if cache is None:
        return build()
    epsilons = tuple([getattr(norm, "eps", None) for norm in norms_of(branches, gate)])
    return cache.get((key, epsilons), tensors_of(branches, gate), build)


# The fields of a config that decide where a weight is packed; batch and image size only change the others.
_PACKED_FIELDS = ("BLOCK_CI", "BLOCK_CO", "RUN_W")


@lru_cache(maxsize=1024)
def _layout(launch: BranchLaunch) -> Hashable:
    fields = tuple(getattr(launch.config, field, None) for field in _PACKED_FIELDS)
    blocks = blocking(launch.shape, launch.config).blocks
    return launch.start, launch.stop, launch.shape, type(launch.config), fields, blocks


@torch.no_grad()
def _pack(plan: Plan, branches: Sequence[Branch], gate: Gate) -> Packed:
    weights: list[Tensor] = []
    shifts: list[Tensor | None] = []
    by_layout: dict[Hashable, int] = {}
    for launch in plan.branch_launches:
        index = by_layout.setdefault(_layout(launch), len(weights))
        if index < len(weights):
            weights.append(weights[index])
            shifts.append(shifts[index])
            continue
        scaled, shift = _fold(branches[launch.start : launch.stop])
        weights.append(pack_branch_weights(scaled, launch.shape, launch.config, plan.dtype))
        shifts.append(shift)
    width = gate.reduce_weight.shape[0]
    gate_scale, gate_shift = fold_norm(gate.norm, gate.reduce_bias, width, gate.reduce_weight)
    select_weight = torch.cat([w.flatten(1) for w in gate.select_weight])
    select_bias = None
    if gate.select_bias is not None:
        select_bias = torch.cat([b.float() for b in gate.select_bias])
    return Packed(
        weights=tuple(weights),
        shifts=tuple(shifts),
        reduce_weight=gate.reduce_weight.flatten(1).to(plan.dtype).contiguous(),
        gate_scale=gate_scale,
        gate_shift=gate_shift,
        select_weight=select_weight.to(plan.dtype).reshape(len(branches), -1, width),
        select_bias=select_bias,
    )


def _fold(branches: Sequence[Branch]) -> tuple[list[Tensor], Tensor | None]:
    """Weights in fp32 with the norms' scales in them, and the shifts ``[M, C]``, None where nothing is added."""
    scaled, shifts, has_shift = [], [], False
    for branch in branches:
        scale, shift = fold_norm(branch.norm, branch.bias, branch.weight.shape[0], branch.weight)
        scaled.append(branch.weight.float() * scale[:, None, None, None])
        shifts.append(shift)
        has_shift |= branch.norm is not None or branch.bias is not None
    return scaled, torch.stack(shifts) if has_shift else None


@torch.no_grad()
def _pack_library(plan: Plan, branches: Sequence[Branch], gate: Gate) -> Packed:
    scaled, shift = _fold(branches)
    weights = [weight.to(plan.dtype, memory_format=torch.channels_last) for weight in scaled]
    return replace(_pack(plan, branches, gate), weights=tuple(weights), shifts=(shift,))


@dataclass(frozen=True)
class MergedPacked(Packed):
    """A unit's parameters, packed for a plan of schedule "merged" on inputs of one size.

    Attributes:
        weights, shifts: one tensor of all branches on their common lattice, norms left out, and their shifts.
        scale: ``[M, C]`` fp32, the norms' scales, or None without norms.
        section_weights, pooled_shift: what a pixel of x, and a pixel of the output, add to the pooled sums.
        strips, columns: int32 tables of the rows and columns of x, see `border_sums_fwd`.
    """

    scale: Tensor | None
    section_weights: Tensor
    pooled_shift: Tensor | None
    strips: Tensor
    columns: Tensor

    def tensors(self) -> list[Tensor]:
        own = (self.scale, self.section_weights, self.pooled_shift, self.strips, self.columns)
        return [*super().tensors(), *(t for t in own if t is not None)]


@torch.no_grad()
def _pack_merged(
    plan: Plan, launch: MergedLaunch, h: int, w: int, branches: Sequence[Branch], gate: Gate
) -> MergedPacked:
    kernel, pitch = launch.shape.kernels[0], launch.shape.dilations[0]
    wide, scaled, scales, shifts = [], [], [], []
    for branch, dilation in zip(branches, launch.branches.dilations, strict=True):
        scale, shift = fold_norm(branch.norm, branch.bias, branch.weight.shape[0], branch.weight)
        weight = widen_kernel(branch.weight.to(plan.dtype).float(), dilation, kernel, pitch)
        wide.append(weight)
        scaled.append(weight * scale[:, None, None, None])
        scales.append(scale)
        shifts.append(shift)
    has_norm = any(branch.norm is not None for branch in branches)
    has_shift = has_norm or any(branch.bias is not None for branch in branches)
    rest = _pack(plan, branches, gate)
    device = branches[0].weight.device
    if isinstance(launch.conv, WindowConfig):
        own = [branch.weight.to(plan.dtype).float() for branch in branches]
        packed = pack_branch_weights(own, launch.branches, launch.conv, plan.dtype)
    else:
        packed = pack_branch_weights(wide, launch.shape, launch.conv, plan.dtype)
    return MergedPacked(
        weights=(packed,),
        shifts=(torch.stack(shifts) if has_shift else None,),
        reduce_weight=rest.reduce_weight,
        gate_scale=rest.gate_scale,
        gate_shift=rest.gate_shift,
        select_weight=rest.select_weight,
        select_bias=rest.select_bias,
        scale=torch.stack(scales) if has_norm else None,
        section_weights=section_weights(scaled, launch.shape, h, w),
        pooled_shift=torch.stack(shifts).sum(0) if has_shift else None,
        strips=torch.tensor(strips(launch.shape, h, launch.border.ROWS), dtype=torch.int32, device=device),
        columns=torch.tensor(column_sections(launch.shape, w), dtype=torch.int32, device=device),
    )


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
