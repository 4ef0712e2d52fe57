"""Starts a call again without planning it again: at batch 1 Python would take longer than the computation.

The first call of a kind is checked, planned and run as any other, and recorded: on a CPU, the function that computed
it; on a GPU, its compiled kernels, and which of their arguments point into the input, the output or a workspace. A
later call of the same kind, on an unchanged layer, calls that function, or allocates the output and starts those
kernels with the new addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..backend import current_backend, current_schedule
from ..layout import with_adjacent_channels
from ..packed import Packed
from ..params import UnitModule, tensors_of
from ..precision import allows_tf32
from ..reasons import tracing_reason
from ..save import Save, chosen_save
from ..tuning import user_file
from ..tuning.ranks import pinning_reason
from .recording import MAX_RECORDINGS, Recording, record
from .watch import Watch
from .workspace import Stream, borrow, give_back, stream_of

if TYPE_CHECKING:
    from ..steps import Step  # imports Triton


_PACKAGE = f"{__name__.partition('.')[0]}."


class Replays:
    """The recorded calls of one layer. A deep copy or a pickle is empty."""

    def __init__(self) -> None:
        # Each with the watch that it holds under: another thread may have begun anew.
        self._recordings: dict[Hashable, tuple[Watch, Callable[[Tensor], Tensor]]] = {}
        # By whether gradients are enabled: calls without them depend on what the parameters are as well.
        self._watches: dict[bool, Watch] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._recordings = {}
        self._watches = {}

    def _forget(self, watch: Watch) -> None:
        """Forget what holds under a watch."""
        # Lists: another thread may add meanwhile.
        self._recordings = {kind: own for kind, own in list(self._recordings.items()) if own[0] is not watch}
        self._watches = {mode: own for mode, own in list(self._watches.items()) if own is not watch}

    def run(self, x: Tensor, save: Save | None) -> Tensor | None:
        """The layer's output for x by a recording, or None where there is none that holds; `save` is the layer's."""
        # Dynamo would guard on how many there are.
        if torch.compiler.is_compiling() or not self._recordings:
            return None
        kind = call_kind(x, save)
        recording = None if kind is None else self._recordings.get(kind)
        if recording is None:
            return None
        watch, start = recording
        if not watch.holds():
            self._forget(watch)
            return None
        return start(x)

    def recorder(self, layer: UnitModule, x: Tensor) -> Recorder | None:
        """What takes note of the layer's call on x, None where such a call is planned each time."""
        kind = call_kind(x, layer.save)
        return None if kind is None else Recorder(self, layer, kind, torch.is_grad_enabled())

    def watch(self, layer: UnitModule, has_gradients: bool) -> Watch:
        """The one that holds, or a new one."""
        watch = self._watches.get(has_gradients)
        if watch is not None:
            if watch.holds():
                return watch
            self._forget(watch)
        watch = Watch(layer, has_gradients=has_gradients)
        if watch.is_possible:
            self._watches[has_gradients] = watch
        return watch

    def add(self, layer: UnitModule, kind: Hashable, watch: Watch, start: Callable[[Tensor], Tensor]) -> None:
        """Take `start` for the layer's calls of a kind, if nothing has changed since it was watched first."""
        if len(self._recordings) >= MAX_RECORDINGS:
            self.clear()
        # A subclass may compute its branches from whatever it likes.
        is_ours = all(method.__module__.startswith(_PACKAGE) for method in (layer.branches, layer.gate))
        if is_ours and watch.holds() and watch.covers(tensors_of(layer.branches(), layer.gate())):
            self._recordings[kind] = watch, start

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return Replays()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()


class Recorder(NamedTuple):
    """Takes note of one call of a layer.

    Attributes:
        has_gradients: whether gradients are enabled: a call without them is of another kind.
        watch: the layer as it was before its parameters were packed, None where they are not.
    """

    replays: Replays
    layer: UnitModule
    kind: Hashable
    has_gradients: bool
    watch: Watch | None = None

    def watching(self) -> Recorder:
        """This, with the layer as it is now: a parameter may change, by another thread, while the call runs."""
        return self._replace(watch=self.replays.watch(self.layer, self.has_gradients))

    def add(self, start: Callable[[Tensor], Tensor]) -> None:
        """The call may be computed again by this."""
        watch = self.watch or self.replays.watch(self.layer, self.has_gradients)
        self.replays.add(self.layer, self.kind, watch, start)


def call_kind(x: Any, save: Save | None = None) -> Hashable | None:
    """What a call depends on besides the layer, None where it must be planned each time."""
    # First of all: Dynamo, which would trace the rest, leaves here.
    if tracing_reason("replays"):
        return None
    if type(x) is not Tensor or x.layout is not torch.strided:
        return None
    shape, is_cpu = x.shape, x.is_cpu
    # Elsewhere there is nothing to start.
    if len(shape) != 4 or not (is_cpu or x.is_cuda):
        return None
    has_gradients, device_type = torch.is_grad_enabled(), "cpu" if is_cpu else "cuda"
    # Hooks must find the same tensors saved at every call: recorded ones save others (`torch.utils.checkpoint` counts).
    if has_gradients and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    # A mode is to see the operators that it knows, and no questions about parameters.
    if _get_current_dispatch_mode() is not None:
        return None
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if autocast is not None and not has_gradients:
        return None
    training = (chosen_save(save), autocast) if has_gradients else None
    index = x.get_device()
    # A GPU's stream; a CPU's library and number of threads, by which a batch is computed in parts.
    executor: Hashable
    if is_cpu:
        executor = torch.get_num_threads(), torch.backends.mkldnn.enabled
    else:
        if torch.cuda.current_device() != index or torch.cuda.is_current_stream_capturing():
            return None
        # Not by `torch.cuda.current_stream`, which makes an object of it.
        executor = torch._C._cuda_getCurrentRawStream(index)
    dtype = x.dtype
    return (
        shape,
        x.stride(),
        dtype,
        index,
        x.data_ptr() % 16,
        executor,
        current_backend(),
        current_schedule(),
        *settings_for(dtype),
        training,
    )


def settings_for(dtype: torch.dtype) -> tuple[Hashable, ...]:
    """What a plan depends on besides the call: whether TF32 is allowed, which configs there are, and whether those of
    this user may be used."""
    return dtype is torch.float32 and allows_tf32(), user_file.changes, pinning_reason()


@dataclass(frozen=True)
class InferenceCall:
    """The kernels of one call without gradients.

    Attributes:
        is_converted: whether x is copied so that its channels are adjacent.
        v_layout: size and stride of the output, which has x's dtype.
        stream: that it ran on.
        packed: keeps alive what the kernels' other pointers point to, where nobody else does.
    """

    is_converted: bool
    v_layout: tuple[torch.Size, tuple[int, ...]]
    stream: Stream
    recording: Recording
    packed: Packed | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        x_in: Tensor,
        v: Tensor,
        packed: Packed,
        steps: Sequence[Step],
        started: Sequence[Any],
    ) -> InferenceCall | None:
        """Of a call that has run, if it can be started again: its input and that with adjacent channels, its output,
        the packed parameters, the steps, and what each gave."""
        recording = record(steps, started, (x_in, v), packed.tensors(), outputs=1)
        if recording is None:
            return None
        return cls(x_in is not x, (v.shape, v.stride()), stream_of(x.device), recording)

    def keeping(self, packed: Packed) -> InferenceCall:
        """This, and the packed parameters with it."""
        return replace(self, packed=packed)

    def start(self, x: Tensor) -> Tensor:
        if self.is_converted:
            x = with_adjacent_channels(x)
        v = x.new_empty_strided(*self.v_layout)
        workspace = borrow(self.recording.workspace_bytes, self.stream)
        self.recording.start(x, v, workspace)
        give_back(workspace, self.stream)
        return v
