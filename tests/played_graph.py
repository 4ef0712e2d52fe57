"""A CUDA graph, played without a GPU: what a call runs, and that again in the same memory."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sk_triton.kernels.launch import Launch


class PlayedGraph(TorchDispatchMode):
    """Takes note of the launches and operators in its scope, as a CUDA graph does of kernels; :meth:`replay` runs them
    again on the same tensors. What Python decides in the scope is decided for good.

    Attributes:
        kernels: names of what would be a kernel of the graph, in order.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self._monkeypatch = monkeypatch
        self._steps = []
        self.kernels = []

    def __enter__(self):
        run = Launch.__call__

        def launch(step):
            self.kernels.append(step.kernel.fn.__name__.removesuffix("_kernel").removesuffix("_fwd"))
            with _disable_current_modes():
                self._steps.append(lambda: run(step))
                return run(step)

        self._scope = self._monkeypatch.context()
        self._scope.__enter__().setattr(Launch, "__call__", launch)
        return super().__enter__()

    def __exit__(self, *exception):
        self._scope.__exit__(*exception)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        own = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for t in own}
        results = [
            t for t in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(t, torch.Tensor)
        ]
        new = [t for t in results if t.untyped_storage()._cdata not in storages]
        is_empty = "empty" in func.__name__
        if (new and not is_empty) or func._schema.is_mutable:
            self.kernels.append(func.__name__)
        if is_empty:
            self._steps.append(lambda: _poison(new))
        else:
            self._steps.append(lambda: _again(func, args, kwargs, new))
        return found

    def replay(self):
        for step in self._steps:
            step()


def _poison(tensors):
    """A replay finds in new memory what the one before has left there; here, nothing that may be used."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.untyped_storage().nbytes():
            tensor.fill_(math.nan)


def _again(func, args, kwargs, results):
    found = func(*args, **kwargs)
    if results:
        for old, new in zip(results, found if isinstance(found, (list, tuple)) else [found], strict=True):
            old.copy_(new)
