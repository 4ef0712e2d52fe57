"""The base of the layers: their forward, their cache of packed weights, and `fuse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, fx

from . import functional
from .pack_cache import PackCache, forget_shared
from .params import UnitModule
from .reasons import hooks_of
from .replay.calls import Replays

Unit = TypeVar("Unit", bound="SKUnit")


class SKUnit(UnitModule):
    """What both layers share: the forward through :func:`sk_triton.functional.run` and the cache."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = _new_cache()
        self._replays = Replays()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` -> ``[N, out_channels, H', W']``; see :func:`.functional.sk_conv`."""
        v = self._replays.run(x, self.save)
        if v is not None:
            return v
        if isinstance(x, fx.Proxy):
            return self._traced(x)
        recorder = self._replays.recorder(self, x)
        return functional.run(
            x, self.branches(), self.gate(), self.spec, cache=self._cache, recorder=recorder, save=self.save
        )

    def attention(self, x: Tensor) -> Tensor:
        """The attention to each branch ``[N, M, C]``, which sums to 1 over M; see :func:`.functional.attention`.

        It takes the place of a hook on the gate, which never runs: a forward pass does not call the gate.
        """
        return functional.attention(x, self.branches(), self.gate(), self.spec)

    def _traced(self, x: fx.Proxy) -> fx.Proxy:
        """One call of this layer in a graph of ``torch.fx``, which may contain no more of it."""
        tracer: Any = x.tracer
        path = tracer.path_of_module(self)
        if not path or any(hooks_of(self)):
            what = (
                "a layer with hooks, which would run twice"
                if path
                else "the layer itself, not a network of it"
            )
            raise RuntimeError(
                f"torch.fx traces {what}: let your tracer's is_leaf_module() return True for {type(self).__name__}"
            )
        proxy: fx.Proxy = tracer.create_proxy("call_module", path, (x,), {})
        return proxy

    def fuse(self: Unit) -> Unit:
        """Fold the norms into the convolutions before them, gate included, for good; returns the layer itself.

        The results stay the same up to rounding. The layer then is one of another kind, without norms and with
        biases: ``spec`` says so, the ``state_dict`` has ``bias`` in place of the norms' entries and loads into
        other fused layers, and training goes on without norms. Parameters are new tensors: an optimizer made
        before does not know them. A layer without norms stays as it is, so fusing twice is fusing once.

        Inference does not need it: in eval mode and without gradients the norms are folded anyway, on the side.
        It saves the memory of that second copy, and exports a model without norms.

        Raises:
            RuntimeError: the layer, or one of its norms, is in training mode.
            ValueError: a norm other than BatchNorm2d or SyncBatchNorm, a parametrized convolution, or hooks.
                Nothing has been changed then.
        """
        if self.training:
            raise RuntimeError("fuse() is for inference: call layer.eval() first")
        self._fuse()
        self._forget()
        return self

    def _forget(self) -> None:
        self._cache.clear()
        self._replays.clear()
        forget_shared()

    def _fuse(self) -> None:
        """Fold every norm; the default has none."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also of a shallow copy, whose parameters may become its own.
        super().__setstate__({**state, "_cache": _new_cache(), "_replays": Replays()})

    def _replicate_for_data_parallel(self) -> SKUnit:
        replica: SKUnit = super()._replicate_for_data_parallel()
        # A replica has parameters of its own and runs in a thread of its own.
        replica._cache, replica._replays = _new_cache(), Replays()
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SKUnit:
        # `.to()` and the like: what is kept would hold on to the old memory.
        self._forget()
        result: SKUnit = super()._apply(fn, recurse)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Where FSDP owns the parameters, nothing else tells.
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> SKUnit:
        if mode != self.training:
            self._forget()
        return super().train(mode)


def _new_cache() -> PackCache:
    """A layer's own. What is computed anew for every call, as parametrized weights are, is not worth keeping."""
    return PackCache(takes_computed=False)
