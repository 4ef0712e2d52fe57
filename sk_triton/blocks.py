"""The parts of :class:`sk_triton.SelectiveKernel`: containers with timm's parameter names, and factories."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .folding import fold
from .params import Branch, Gate
from .reasons import hooks_of, norm_reason
from .spec import BranchSpec

Factory = Callable[..., nn.Module]
Placement = dict[str, Any]  # device and dtype


class FoldedNorm(nn.Identity):
    """Stands where a norm was before :meth:`.unit.SKUnit.fuse`, and holds the modules that were below it."""


class ConvPath(nn.Module):
    """One branch: ``conv`` without bias, ``bn``, ``drop``, ``act``, ``aa``; the last three optional.

    A drop or an activation with tensors of its own, such as PReLU, stands below the norm, where timm keeps them:
    ``bn.act.weight``. Others do not, since what replaces a norm (timm's ``freeze``) may leave out what is below it.

    With ``aa_layer`` and a stride above 1, the convolution has stride 1 and ``aa`` does the striding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        branch: BranchSpec,
        stride: int,
        act_layer: Factory | None,
        norm_layer: Factory,
        aa_layer: Factory | None,
        drop_layer: Factory | None,
        placement: Placement,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            branch.kernel_size,
            stride=stride if aa_layer is None else 1,
            padding=branch.padding,
            dilation=branch.dilation,
            groups=branch.groups,
            bias=False,
            **placement,
        )
        self.bn = make_norm(norm_layer, out_channels, placement)
        self._attach("drop", make_drop(drop_layer, placement))
        self._attach("act", make_act(act_layer, placement))
        self.aa: nn.Module | None = None
        if aa_layer is not None and stride > 1:
            self.aa = make_aa(aa_layer, out_channels, stride, placement)
        self._built = conv_settings(self.conv)

    def _attach(self, name: str, module: nn.Module | None) -> None:
        if module is None:
            return
        if hasattr(self.bn, name):
            raise ValueError(
                f"norm_layer must return a norm without a {name!r} of its own, got {type(self.bn).__name__}: "
                f"pass the plain norm, and {name}_layer beside it"
            )
        has_tensors = any(True for _ in (*module.parameters(), *module.buffers()))
        (self.bn if has_tensors else self).add_module(name, module)

    def branch(self, name: str) -> Branch:
        """The parameters as they are now, of the layer's part `name`.

        Raises:
            RuntimeError: as :func:`weight_and_bias`.
            ValueError: the convolution's settings were changed.
        """
        modules = self._modules
        weight, bias = weight_and_bias(f"{name}.conv", modules["conv"])  # type: ignore[arg-type]
        check_conv_settings(f"{name}.conv", modules["conv"], self._built)
        bn: Any = modules["bn"]
        drop, act = (bn._modules.get(part, modules.get(part)) for part in ("drop", "act"))
        norm = None if type(bn) is FoldedNorm else bn
        if norm is None:
            warn_of_hooks(f"{name}.bn", bn)
        warn_of_hooks(name, self)
        return Branch(weight, bias, norm, drop, act, self.aa)


class GateLayers(nn.Module):
    """The gate: ``fc_reduce``, ``bn``, ReLU, ``fc_select``; each ``fc`` is a 1x1 convolution without bias."""

    def __init__(self, channels: int, num_branches: int, width: int, placement: Placement) -> None:
        super().__init__()
        self.fc_reduce = nn.Conv2d(channels, width, 1, bias=False, **placement)
        self.bn: nn.BatchNorm2d | FoldedNorm = nn.BatchNorm2d(width, **placement)
        self.act = nn.ReLU(inplace=True)
        self.fc_select = nn.Conv2d(width, channels * num_branches, 1, bias=False, **placement)

    def gate(self, name: str) -> Gate:
        """The parameters as they are now, of the layer's part `name`."""
        reduce_weight, reduce_bias = weight_and_bias(f"{name}.fc_reduce", self.fc_reduce)
        weight, bias = weight_and_bias(f"{name}.fc_select", self.fc_select)
        select_bias = None if bias is None else (bias,)
        norm = None if isinstance(self.bn, FoldedNorm) else self.bn
        if norm is None:
            warn_of_hooks(f"{name}.bn", self.bn)
        warn_of_hooks(name, self)
        return Gate(reduce_weight, reduce_bias, norm, self.act, (weight,), select_bias)


def unfoldable_reason(name: str, conv: nn.Module, norm: nn.Module) -> str:
    """Why :func:`fold_into` cannot fold a norm into the convolution before it; "" if it can."""
    if reason := norm_reason(norm, "fuse() and the schedules"):
        return f"the norm of {name} {reason}"
    if parametrize.is_parametrized(conv):
        return f"{name} is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if any((*hooks_of(conv), *hooks_of(norm))):
        return f"{name} or its norm has forward or backward hooks, which would see something else"
    return ""


def fold_into(conv: nn.Conv2d, norm: nn.Module) -> FoldedNorm:
    """Fold a norm into new parameters of the convolution before it; returns what takes the norm's place."""
    needs_grad = conv.weight.requires_grad
    bias = None if conv.bias is None else conv.bias.detach()
    weight, bias = fold(conv.weight.detach(), bias, norm)
    assert bias is not None
    conv.weight = nn.Parameter(weight, requires_grad=needs_grad)
    conv.bias = nn.Parameter(bias, requires_grad=needs_grad)
    left = FoldedNorm()
    for name, module in norm.named_children():
        left.add_module(name, module)
    return left.train(norm.training)


def conv_settings(conv: Any) -> tuple[Any, ...]:
    """What a convolution computes besides its weights."""
    return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def check_conv_settings(name: str, conv: Any, built: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` if a convolution is no longer what it was built as: the unit's spec decides, not it."""
    now = conv_settings(conv)
    if now != built:
        raise ValueError(
            f"{name}: stride, padding, dilation, groups and padding_mode must stay as built, {built}, got {now}; "
            "build a layer with other settings and load the state_dict"
        )


_PLAIN_KINDS = (nn.Conv2d, nn.Linear)


def _computes_plainly(kind: type[nn.Module]) -> bool:
    """Whether modules of a subclass, as parametrized ones are, compute what their base class does."""
    if issubclass(kind, nn.Conv2d):
        return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward


def weight_and_bias(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias`` of a layer's part `name` as they are now, parametrised ones included.

    Raises:
        RuntimeError: a hook of ``torch.nn.utils`` (pruning, the old weight and spectral norm) would compute them, or
            the module computes something else than its base class (an adapter, a quantized layer).

    Warns:
        RuntimeWarning: it has other hooks, which do not run.
    """
    kind = type(module)
    if "forward" in module.__dict__:
        raise RuntimeError(
            f"{name}: the forward of a {kind.__name__} has been replaced (by an adapter, a quantizer, offloading); it "
            "does not run here: merge or remove it, or leave this layer out"
        )
    if kind not in _PLAIN_KINDS and not _computes_plainly(kind):
        raise RuntimeError(
            f"{name}: {kind.__name__} stands where a Conv2d or a Linear was built; its own forward does not run here: "
            "merge or remove it, or leave this layer out"
        )
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            raise RuntimeError(
                f"{name}: {type(hook).__name__} recomputes a weight in a forward hook, which does not run here: "
                "use torch.nn.utils.parametrizations, or make the change permanent"
            )
    warn_of_hooks(name, module)
    # Plain attribute access costs about 1 us each through nn.Module.__getattr__, which shows at batch 1.
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]  # type: ignore[return-value]
    return module.weight, module.bias  # type: ignore[return-value]


def warn_of_hooks(name: str, module: nn.Module) -> None:
    """Warn of hooks on a layer's part `name`, whose forward the layer does not call."""
    if not torch.compiler.is_compiling() and any(hooks_of(module)):
        warnings.warn(
            f"hooks of {name}, a {type(module).__name__}, never run: a selective-kernel layer takes its parameters and "
            "does not call it; register them on the layer itself",
            RuntimeWarning,
            stacklevel=2,
        )


def make_norm(norm_layer: Factory, channels: int, placement: Placement) -> nn.Module:
    """``norm_layer(channels)``; ``nn.GroupNorm``, or a partial of it with keywords, has 32 groups by default.

    Raises:
        TypeError: ``norm_layer`` is not a callable that returns a module.
    """
    keywords: dict[str, Any] = {}
    target: Any = norm_layer
    if isinstance(target, functools.partial) and not target.args:
        target, keywords = target.func, target.keywords
    if target is nn.GroupNorm:  # its first argument is the number of groups, unlike every other norm
        norm_layer = functools.partial(
            nn.GroupNorm, **{"num_groups": 32, **keywords, "num_channels": channels}
        )
        return _placed("norm_layer", norm_layer, placement)
    return _placed("norm_layer", norm_layer, placement, channels)


def make_act(act_layer: Factory | None, placement: Placement) -> nn.Module | None:
    """``act_layer(inplace=True)``, or ``act_layer()`` where it takes no such argument; None for no act.

    Raises:
        TypeError: ``act_layer`` is not a callable that returns a module.
    """
    if act_layer is None:
        return None
    act = _placed("act_layer", act_layer, placement, keywords={"inplace": True})
    return None if isinstance(act, nn.Identity) else act


def make_drop(drop_layer: Factory | None, placement: Placement) -> nn.Module | None:
    """``drop_layer()``, or None.

    Raises:
        TypeError: ``drop_layer`` is not a callable that returns a module.
    """
    return None if drop_layer is None else _placed("drop_layer", drop_layer, placement)


def make_aa(aa_layer: Factory, channels: int, stride: int, placement: Placement) -> nn.Module:
    """``aa_layer(channels=, stride=)``, or ``aa_layer(stride)`` where it takes no such arguments.

    Raises:
        TypeError: ``aa_layer`` is not a callable that returns a module.
    """
    return _placed("aa_layer", aa_layer, placement, stride, keywords={"channels": channels, "stride": stride})


def _placed(
    name: str, factory: Factory, placement: Placement, *args: Any, keywords: dict[str, Any] | None = None
) -> nn.Module:
    """What the factory makes of `keywords`, or of `args` where it takes none such, where it belongs."""
    if isinstance(factory, nn.Module):
        kind = type(factory).__name__
        raise TypeError(
            f"{name} must be a class or a function that makes a module, got a module: {kind}, not {kind}(...)"
        )
    # Not handed to the factory: not every one takes device and dtype.
    device = placement.get("device")
    module = None
    if callable(factory):
        with contextlib.nullcontext() if device is None else torch.device(device):
            try:
                module = factory(**keywords) if keywords else factory(*args)
            except TypeError:
                if not keywords:
                    raise
                module = factory(*args)
    if not isinstance(module, nn.Module):
        returned = f", which returns {type(module).__name__}" if callable(factory) else ""
        raise TypeError(f"{name} must be a callable that returns an nn.Module, got {factory!r}{returned}")
    return module.to(**placement) if any(v is not None for v in placement.values()) else module
