"""How a module is run: memory format, compilation, CUDA graph. Adding a form is one class here.

Every form but `HEURISTIC` lets cuDNN time its algorithms (`torch.backends.cudnn.benchmark`). PyTorch keeps the
algorithm that a thread first found for a convolution for the life of that thread, under a key that leaves this switch
out (`benchmark_cache` in aten/src/ATen/native/cudnn/Conv_v8.cpp): whoever runs a shape first decides for all who follow
in the same thread. So the forms with the switch off have a thread of their own, in which it is never on. Gradients are
computed in a thread that all forms share: there is no such form of training.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Call = Callable[[], Tensor]
"""One measured call, ready to run; returns the output."""

MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
"""Without PyTorch's own graphs, which copy the input in every call: `_Graph` captures the same kernels without."""

GRAPH_WARM_UPS = 3


class Form:
    """Eager PyTorch in NCHW; every other form changes some of it."""

    key: str = "nchw"
    label: str = "NCHW"
    memory_format: torch.memory_format = torch.contiguous_format
    is_compiled: bool = False
    is_graph: bool = False
    is_benchmarking: bool = True

    def prepare(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """`module`, ready to be called."""
        return module

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What holds around a measurement, entered outside of the timed call."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.is_benchmarking
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def bind(self, call: Call) -> Call:
        """The call as this form makes it, once its input is fixed."""
        return call

    def run(self, action: Callable[[], T]) -> T:
        """Does whatever calls the module, sampling its time included, in the thread that it belongs to."""
        return action()


class ChannelsLast(Form):
    """Eager PyTorch in channels_last."""

    key = "channels_last"
    label = "channels_last"
    memory_format = torch.channels_last


class _Compiled(Form):
    """`torch.compile` with static shapes, in its default mode or tuning as much as it can."""

    is_compiled = True

    def __init__(self, base: Form, mode: str | None) -> None:
        self.key = f"{'max-autotune' if mode else 'compile'}-{base.key}"
        self.label = f"torch.compile{', max-autotune' if mode else ''}, {base.label}"
        self.memory_format, self.mode = base.memory_format, mode

    def prepare(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        # The full graph or an error: what falls back to eager in parts must not be called compiled.
        return torch.compile(module, dynamic=False, fullgraph=True, mode=self.mode)


class _Graph(Form):
    """Another form's kernels captured in a CUDA graph: no host time between them, and no copy of the input."""

    is_graph = True

    def __init__(self, base: Form) -> None:
        self.base = base
        self.key, self.label = f"graph-{base.key}", f"CUDA graph, {base.label}"
        self.memory_format, self.is_compiled = base.memory_format, base.is_compiled

    def prepare(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return self.base.prepare(module)

    def bind(self, call: Call) -> Call:
        # Warm-ups share the stream of the capture: library handles belong to a stream, and making one is no work
        # that a graph can hold. Garbage that is collected during the capture may do such work as well.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        # Older releases leave the capturing stream current where a capture fails; the outer context does not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=stream):
            result = call()
        return functools.partial(_replay, graph, result)


class _Heuristic(Form):
    """Another form with the algorithms that cuDNN takes unmeasured: `torch.backends.cudnn.benchmark` off."""

    is_benchmarking = False

    def __init__(self, base: Form) -> None:
        self.base = base
        self.key, self.label = f"heuristic-{base.key}", f"{base.label}, cudnn.benchmark off"
        self.memory_format, self.is_graph = base.memory_format, base.is_graph

    def bind(self, call: Call) -> Call:
        return self.base.bind(call)

    def run(self, action: Callable[[], T]) -> T:
        # Which device is current is a matter of each thread.
        here = torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_available() else nullcontext()

        def there() -> T:
            with here:
                return action()

        return _unbenchmarked_thread().submit(there).result()


@functools.cache
def _unbenchmarked_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "cudnn.benchmark off")


def _replay(graph: torch.cuda.CUDAGraph, result: Tensor) -> Tensor:
    graph.replay()
    return result


NCHW = Form()
CHANNELS_LAST = ChannelsLast()
EAGER = (NCHW, CHANNELS_LAST)
COMPILED = tuple(_Compiled(base, None) for base in EAGER)
MAX_AUTOTUNED = tuple(_Compiled(base, MAX_AUTOTUNE) for base in EAGER)
GRAPHS = tuple(_Graph(base) for base in EAGER)
COMPILED_GRAPHS = tuple(_Graph(base) for base in COMPILED)
MAX_AUTOTUNED_GRAPHS = tuple(_Graph(base) for base in MAX_AUTOTUNED)
HEURISTIC = tuple(_Heuristic(base) for base in (*EAGER, *GRAPHS))
"""For inference on NVIDIA's GPUs; compiled forms take the same convolutions, at minutes more."""
EVERY = {
    form.key: form
    for form in (*EAGER, *COMPILED, *MAX_AUTOTUNED, *GRAPHS, *COMPILED_GRAPHS, *MAX_AUTOTUNED_GRAPHS)
}
"""Every form but those of `HEURISTIC`, by its key: those of `--every-form`."""
BY_KEY = EVERY | {form.key: form for form in HEURISTIC}
"""Every form there is."""
