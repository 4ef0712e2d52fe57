"""timm's layers in a network, replaced by this package's around the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .blocks import conv_settings
from .layers import SelectiveKernel
from .reasons import hooks_of
from .unit import SKUnit

_PLAIN_NORMS = {"BatchNormAct2d": nn.BatchNorm2d, "SyncBatchNormAct": nn.SyncBatchNorm}
"""timm's norms that hold a drop and an activation, and what each is without."""
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def convert(model: nn.Module) -> nn.Module:
    """Replace every ``SelectiveKernel`` of timm's in a network by :class:`SelectiveKernel`, in place, as
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces norms.

    Parameters and buffers stay the same tensors, so an optimizer made before goes on; keys of the ``state_dict``,
    frozen parameters and the mode of every part, training or eval, stay too. What is converted already is left alone.

    Args:
        model: a network, or one of timm's layers.

    Returns:
        ``model``; for one of timm's layers, what takes its place.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it holds no selective-kernel layer, or one that is not timm's own in all parts: a subclass, another
            norm than timm's batch norms, other convolutions, tensors of its own, hooks, a replaced ``forward``. Nothing
            has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {unit: name or "model" for name, unit in model.named_modules() if _is_timms(unit)}
    if not found and not any(isinstance(module, SKUnit) for module in model.modules()):
        raise ValueError(f"model must hold a SelectiveKernel of timm's, got a {type(model).__name__} without")
    layers: dict[nn.Module, SelectiveKernel] = {}
    for unit, name in found.items():
        try:
            layers[unit] = _layer_around(unit)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                setattr(parent, name, layers[child])
    return layers.get(model, model)


def _is_timms(module: nn.Module) -> bool:
    """Whether it is of timm's class or a subclass; timm itself is not imported."""
    return any(kind.__name__ == "SelectiveKernel" and _is_from_timm(kind) for kind in type(module).__mro__)


def _is_from_timm(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "timm"


def _layer_around(unit: Any) -> SelectiveKernel:
    """This package's layer with the parts of timm's.

    Raises:
        RuntimeError, ValueError: it cannot take all of them.
    """
    if not _is_from_timm(type(unit)):
        raise ValueError(f"a {type(unit).__name__} is a subclass, which may compute something else")
    for part, module in unit.named_modules():
        what = part or "the layer"
        if any(hooks_of(module)) or "forward" in module.__dict__:
            raise ValueError(f"{what} has hooks or a replaced forward, which would not run; remove them")
        if any(getattr(module, name) for name in _STATE_HOOKS):
            raise ValueError(f"{what} has hooks on its state_dict, which would be lost; remove them")
    convs = [path.conv for path in unit.paths]
    norms = [path.bn for path in unit.paths]
    plain_norms = [_plain_norm(norm, f"paths.{i}.bn") for i, norm in enumerate(norms)]
    has_drop = not all(isinstance(norm.drop, nn.Identity) for norm in norms)
    has_aa = unit.paths[0].aa is not None
    is_3x3 = all(conv.kernel_size == (3, 3) for conv in convs)
    with torch.device("meta"):  # of the convolutions and the gate, which are timm's in the end
        layer = SelectiveKernel(
            unit.in_channels,
            unit.out_channels,
            [2 * conv.dilation[0] + 1 if is_3x3 else conv.kernel_size[0] for conv in convs],
            stride=2 if has_aa else convs[0].stride[0],
            dilation=1 if is_3x3 else convs[0].dilation[0],
            groups=convs[0].groups,
            keep_3x3=is_3x3,
            split_input=unit.split_input,
            act_layer=_in_turn(norm.act for norm in norms),
            norm_layer=_in_turn(plain_norms),
            aa_layer=_in_turn(path.aa for path in unit.paths) if has_aa else None,
            drop_layer=_in_turn(norm.drop for norm in norms) if has_drop else None,
            gate_width=unit.attn.fc_reduce.out_channels,
        )
    for i, (ours, conv) in enumerate(zip(layer.paths, convs, strict=True)):
        if conv_settings(conv) != conv_settings(ours.conv):
            raise ValueError(
                f"paths.{i}.conv: stride, padding, dilation, groups and padding_mode must be "
                f"{conv_settings(ours.conv)}, got {conv_settings(conv)}"
            )
        ours.conv = conv
    for part, module in unit.attn.named_children():
        setattr(layer.attn, part, module)
    layer.branches()  # whatever they refuse
    layer.gate()
    for ours, theirs in (
        (layer, unit),
        (layer.paths, unit.paths),
        (layer.attn, unit.attn),
        *zip(layer.paths, unit.paths, strict=True),
    ):
        ours.training = theirs.training
    if lost := _tensor_names(unit) ^ _tensor_names(layer):
        raise ValueError(f"{', '.join(sorted(lost))}: not of timm's layer, and would be lost")
    return layer


def _tensor_names(module: nn.Module) -> set[str]:
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


def _plain_norm(norm: Any, name: str) -> nn.Module:
    """The batch norm of timm's norm with drop and activation: its parameters, its buffers and its mode."""
    kind = _PLAIN_NORMS.get(type(norm).__name__) if _is_from_timm(type(norm)) else None
    if kind is None:
        raise ValueError(
            f"{name}: its norm must be timm's {' or '.join(_PLAIN_NORMS)}, got a {type(norm).__name__}: convert the "
            "model before norms are replaced, or build it with sk_triton.SelectiveKernel in timm.models.sknet"
        )
    group = {"process_group": norm.process_group} if kind is nn.SyncBatchNorm else {}
    plain = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **group)
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    plain._non_persistent_buffers_set |= norm._non_persistent_buffers_set
    plain.training = norm.training
    return plain


def _in_turn(modules: Iterable[nn.Module]) -> Callable[..., nn.Module]:
    """A factory that hands out what is made already."""
    left = iter(list(modules))
    return lambda *args, **kwargs: next(left)
