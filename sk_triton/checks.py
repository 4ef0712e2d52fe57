"""What may enter a selective-kernel unit; everything else raises here, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .params import Branch, Gate, Map
from .reasons import FOLDABLE_NORMS
from .spec import SKSpec

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def act_name(act: Map | None) -> str:
    """The name of an activation in a :class:`SKSpec`: "relu", "identity", or its class or function name."""
    # A subclass may compute something else.
    if type(act) is nn.ReLU or act is F.relu or act is torch.relu:
        return "relu"
    if act is None or type(act) is nn.Identity:
        return "identity"
    kind: Any = type(act) if isinstance(act, nn.Module) or not hasattr(act, "__name__") else act
    # Another one may bear the name of these two.
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in ("relu", "identity") else kind.__name__


def check_input(x: Tensor, spec: SKSpec) -> None:
    """Check the input alone.

    Raises:
        TypeError: not a tensor, or not of float16, bfloat16, float32 or float64.
        ValueError: not ``[N, in_channels, H, W]`` with H, W >= 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"x must have dtype float16, bfloat16, float32 or float64, got {x.dtype}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"x must be 4-D [N, C, H, W], got {len(shape)}-D of shape {list(shape)}")
    if shape[1] != spec.in_channels:
        raise ValueError(
            f"x must have in_channels = {spec.in_channels} channels, got {shape[1]}: {list(shape)}"
        )
    if shape[2] < 1 or shape[3] < 1:
        height, width = spec.output_size(shape[2], shape[3])
        raise ValueError(
            f"x must have height and width >= 1, got shape {list(shape)}: output size {height}x{width}"
        )


def check_params(
    x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, autocast: torch.dtype | None = None
) -> None:
    """Check branches and gate against the spec, and their dtypes and devices against the input's.

    Args:
        autocast: the dtype of the autocast in force, or None. It lets dtypes differ, as for ``nn.Conv2d``.

    Raises:
        TypeError: mixed dtypes.
        ValueError: mixed devices, wrong shapes, or parts that the spec does not describe.
    """
    if len(branches) != spec.num_branches:
        raise ValueError(f"branches must hold M = {spec.num_branches} (spec.branches), got {len(branches)}")
    like = (x.device, x.dtype, autocast)
    channels, width = spec.out_channels, spec.gate_width
    for m, (branch, shape) in enumerate(zip(branches, spec.weight_shapes, strict=True)):
        weight, bias, norm, _, act, _ = branch
        _check_tensor(weight, (shape,), like, "branches[{}].weight", m)
        if bias is not None:
            _check_tensor(bias, ((channels,),), like, "branches[{}].bias", m)
        if (bias is not None) is not spec.branch_bias:
            _refuse_part(f"branches[{m}].bias", bias, "branch_bias", spec.branch_bias)
        if (norm is not None) is not spec.branch_norm:
            _refuse_part(f"branches[{m}].norm", norm, "branch_norm", spec.branch_norm)
        if type(norm) in FOLDABLE_NORMS:
            _check_norm(norm, channels, like, f"branches[{m}].norm")
        if act_name(act) != spec.branch_act:
            _refuse_act(f"branches[{m}].act", act, "branch_act", spec.branch_act)

    _check_tensor(
        gate.reduce_weight, ((width, channels), (width, channels, 1, 1)), like, "gate.reduce_weight"
    )
    if gate.reduce_bias is not None:
        _check_tensor(gate.reduce_bias, ((width,),), like, "gate.reduce_bias")
    if (gate.reduce_bias is not None) is not spec.gate_bias:
        _refuse_part("gate.reduce_bias", gate.reduce_bias, "gate_bias", spec.gate_bias)
    if (gate.norm is not None) is not spec.gate_norm:
        _refuse_part("gate.norm", gate.norm, "gate_norm", spec.gate_norm)
    if type(gate.norm) in FOLDABLE_NORMS:
        _check_norm(gate.norm, width, like, "gate.norm")
    if act_name(gate.act) != spec.gate_act:
        _refuse_act("gate.act", gate.act, "gate_act", spec.gate_act)
    _check_stack(gate.select_weight, ((width,), (width, 1, 1)), like, spec, "gate.select_weight")
    if gate.select_bias is not None:
        _check_stack(gate.select_bias, ((),), like, spec, "gate.select_bias")
    if (gate.select_bias is not None) is not spec.select_bias:
        _refuse_part("gate.select_bias", gate.select_bias, "select_bias", spec.select_bias)


_Shapes = tuple[tuple[int, ...], ...]
_Like = tuple[torch.device, torch.dtype, "torch.dtype | None"]


def _check_tensor(tensor: Tensor, shapes: _Shapes, like: _Like, name: str, index: int = 0) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name.format(index)} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name.format(index)} must have shape {allowed}, got {list(tensor.shape)}")
    device, dtype, autocast = like
    if tensor.device != device:
        raise ValueError(f"{name.format(index)} must be on the device of x, {device}, got {tensor.device}")
    if tensor.dtype is not dtype and (
        # Autocast casts every floating dtype but float64.
        autocast is None or tensor.dtype not in INPUT_DTYPES or torch.float64 in (tensor.dtype, dtype)
    ):
        raise TypeError(f"{name.format(index)} must have the dtype of x, {dtype}, got {tensor.dtype}")


def _check_norm(norm: Any, size: int, like: _Like, name: str) -> None:
    """Check what a batch norm holds for each channel; its dtype may be another than the input's."""
    for own, keys in (
        (norm._parameters, ("weight", "bias")),
        (norm._buffers, ("running_mean", "running_var")),
    ):
        for key in keys:
            tensor = own.get(key)
            if tensor is not None:
                if tensor.shape != (size,):
                    raise ValueError(f"{name}.{key} must have shape {[size]}, got {list(tensor.shape)}")
                if tensor.device != like[0]:
                    raise ValueError(
                        f"{name}.{key} must be on the device of x, {like[0]}, got {tensor.device}"
                    )


def _check_stack(parts: tuple[Tensor, ...], tails: _Shapes, like: _Like, spec: SKSpec, name: str) -> None:
    rows = 0
    for i, part in enumerate(parts):
        size = part.shape[0] if isinstance(part, Tensor) and part.dim() else 0
        _check_tensor(part, tuple((size, *tail) for tail in tails), like, name + "[{}]", i)
        rows += size
    if rows != spec.num_branches * spec.out_channels:
        raise ValueError(
            f"{name} must have M * C = {spec.num_branches} * {spec.out_channels} rows in all, got {rows}"
        )


def _refuse_part(name: str, part: object, setting: str, expected: bool) -> None:
    found = "None" if part is None else f"a {type(part).__name__}"
    raise ValueError(
        f"{name} must {'not ' if expected else ''}be None as spec.{setting} is {expected}, got {found}"
    )


def _refuse_act(name: str, act: Map | None, setting: str, expected: str) -> None:
    raise ValueError(f"{name} must be {expected!r} as spec.{setting} says, got {act_name(act)!r}")
