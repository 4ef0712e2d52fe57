"""Starts a call again without planning it again: at batch 1 Python would take longer than the computation.

The first call of a kind is checked, planned and run as any other, and recorded: on a CPU, the function that computed
it; on a GPU, its compiled kernels, and which of their arguments point into the input, the output or a workspace. A
later call of the same kind, on an unchanged layer, calls that function, or allocates the output and one workspace and
starts those kernels with the new addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .backend import current_backend, current_schedule
from .kernels.launch import Launch
from .layout import with_adjacent_channels
from .packing import Packed, sources
from .precision import allows_tf32
from .reasons import tracing_reason
from .tuning import cache
from .tuning.ranks import pinning_reason
from .watch import Watch

if TYPE_CHECKING:
    from .steps import Step  # imports Triton
    from .unit import SKUnit

# Recordings of a layer; one that meets more kinds of calls forgets them and begins again.
MAX_RECORDINGS = 64
# Bytes; Triton specialises for addresses that 16 divides.
_ALIGNMENT = 256


class Replays:
    """The recorded calls of one layer. A deep copy or a pickle is empty."""

    def __init__(self) -> None:
        # Each with the watch that it holds under: another thread may have begun anew.
        self._recordings: dict[Hashable, tuple[Watch, Callable[[Tensor], Tensor]]] = {}
        self._watch: Watch | None = None

    def clear(self) -> None:
        """Forget everything."""
        self._recordings = {}
        self._watch = None

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output for x by a recording, or None where there is none that holds."""
        if not self._recordings:
            return None
        kind = _kind(x)
        recording = None if kind is None else self._recordings.get(kind)
        if recording is None:
            return None
        watch, start = recording
        if not watch.holds():
            self.clear()
            return None
        return start(x)

    def recorder(self, layer: SKUnit, x: Tensor) -> Recorder | None:
        """What takes note of the layer's call on x, None where such a call is planned each time."""
        kind = _kind(x)
        return None if kind is None else Recorder(self, layer, kind, x.stride(1) != 1)

    def add(self, layer: SKUnit, kind: Hashable, start: Callable[[Tensor], Tensor]) -> None:
        """Take `start` for the layer's calls of a kind."""
        watch = self._watch
        if watch is None or not watch.holds() or len(self._recordings) == MAX_RECORDINGS:
            self.clear()
            self._watch = watch = Watch(layer)
        # A subclass may compute its branches from whatever it likes.
        is_ours = all(
            method.__module__.startswith(f"{__package__}.") for method in (layer.branches, layer.gate)
        )
        if watch.is_possible and is_ours and watch.covers(sources(layer.branches(), layer.gate())):
            self._recordings[kind] = watch, start

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()


class Recorder(NamedTuple):
    """Takes note of one call of a layer."""

    replays: Replays
    layer: SKUnit
    kind: Hashable
    is_converted: bool

    def record_function(self, compute: Callable[[Tensor], Tensor]) -> None:
        """The call computed this, and may compute it again."""
        self.replays.add(self.layer, self.kind, compute)

    def record_launches(
        self, x: Tensor, v: Tensor, packed: Packed, steps: Sequence[Step], started: Sequence[Any]
    ) -> None:
        """The call has run: x with adjacent channels, v, the packed parameters, the steps, what each gave."""
        recording = _recording(self.is_converted, x, v, packed, steps, started)
        if recording is not None:
            self.replays.add(self.layer, self.kind, recording.start)


def _kind(x: Any) -> Hashable | None:
    """What a call depends on besides the layer, None where it must be planned each time."""
    # First of all: Dynamo, which would trace the rest, leaves here.
    if tracing_reason("replays"):
        return None
    if torch.is_grad_enabled() or type(x) is not Tensor or x.layout is not torch.strided:
        return None
    shape, device = x.shape, x.device
    if len(shape) != 4:
        return None
    device_type = device.type
    # Autocast does not know the meta device, on which there is nothing to start.
    if device_type == "meta" or torch.is_autocast_enabled(device_type):
        return None
    # A GPU's stream; a CPU's number of threads, by which a batch is computed in parts.
    executor = 0
    if device_type == "cpu":
        executor = torch.get_num_threads()
    elif device_type == "cuda":
        if torch.cuda.current_device() != device.index or torch.cuda.is_current_stream_capturing():
            return None
        executor = torch.cuda.current_stream(device).cuda_stream
    dtype = x.dtype
    return (
        shape,
        x.stride(),
        dtype,
        device,
        x.data_ptr() % 16,
        executor,
        current_backend(),
        current_schedule(),
        dtype is torch.float32 and allows_tf32(),
        # Which configs there are, and whether those of this user may be used.
        cache.changes,
        pinning_reason(),
    )


class _Start(NamedTuple):
    """One kernel to start.

    `pointers`: (index of an argument, what it points into, by how many bytes); `tuples`: (index, the same two for each
    member) of arguments that are tuples of pointers.
    """

    run: Callable[..., object]
    arguments: list[Any]
    pointers: tuple[tuple[int, int, int], ...]
    tuples: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


# What a pointer points into.
_X, _V, _WORKSPACE, _FIXED = range(4)


@dataclass(frozen=True)
class _Recording:
    """The kernels of one call.

    Attributes:
        is_converted: whether x is copied so that its channels are adjacent.
        v: size and stride of the output, which has x's dtype.
        workspace_size: in elements of x's dtype.
        packed, kept: keep alive what the kernels' other pointers point to.
    """

    is_converted: bool
    v: tuple[torch.Size, tuple[int, ...]]
    workspace_size: int
    starts: tuple[_Start, ...]
    packed: Packed
    kept: tuple[Tensor, ...] = ()

    def start(self, x: Tensor) -> Tensor:
        if self.is_converted:
            x = with_adjacent_channels(x)
        v = x.new_empty_strided(*self.v)
        workspace = x.new_empty(self.workspace_size)
        # The last one is that of addresses that stay.
        bases = (x.data_ptr(), v.data_ptr(), workspace.data_ptr(), 0)
        for run, template, pointers, tuples in self.starts:
            arguments = template.copy()
            for index, base, offset in pointers:
                arguments[index] = bases[base] + offset
            for index, members in tuples:
                arguments[index] = tuple([bases[base] + offset for base, offset in members])
            run(*arguments)
        return v


def _recording(
    is_converted: bool, x: Tensor, v: Tensor, packed: Packed, steps: Sequence[Step], started: Sequence[Any]
) -> _Recording | None:
    """None where a step is no kernel launch, or is interpreted, or where x and a parameter share memory."""
    kept = tuple(tensor for step in steps for tensor in getattr(step, "kept", ()))
    fixed = {_storage(t) for t in (*packed.tensors(), *kept)}
    origins = {_storage(x): (_X, x.data_ptr()), _storage(v): (_V, v.data_ptr())}
    if fixed & origins.keys():
        return None
    workspace_bytes = 0

    def place(tensor: Tensor) -> tuple[int, int]:
        """What a tensor's address points into, and by how many bytes."""
        nonlocal workspace_bytes
        storage = _storage(tensor)
        if storage in fixed:
            return _FIXED, tensor.data_ptr()
        if storage not in origins:
            # What the call's launches share becomes a part of one workspace.
            origins[storage] = (_WORKSPACE, storage - workspace_bytes)
            size = tensor.untyped_storage().nbytes()
            workspace_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        base, origin = origins[storage]
        return base, tensor.data_ptr() - origin

    starts = []
    for step, compiled in zip(steps, started, strict=True):
        if compiled is None or not isinstance(step, Launch):
            return None
        arguments = [*step.arguments]
        arguments += [step.constexprs[name] for name in step.kernel.arg_names[len(arguments) :]]
        pointers, tuples = [], []
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                base, offset = place(argument)
                arguments[index] = offset if base == _FIXED else None
                if base != _FIXED:
                    pointers.append((index, base, offset))
            elif isinstance(argument, tuple) and index < len(step.arguments):
                arguments[index] = None
                tuples.append((index, tuple(map(place, argument))))
        starts.append(_Start(compiled[(*step.grid, 1, 1)[:3]], arguments, tuple(pointers), tuple(tuples)))
    workspace_size = workspace_bytes // x.element_size()
    return _Recording(is_converted, (v.shape, v.stride()), workspace_size, tuple(starts), packed, kept)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
