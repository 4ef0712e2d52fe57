"""Why a call cannot take a path made for inference; what all such paths, on any device, have in common.

Each function returns the reason, or "". `who` is the subject of its sentence: "the kernels".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .params import Branch, Gate, tensors_of
from .spec import SKSpec

FOLDABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Identities outside of training.
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PLAIN = (Tensor, nn.Parameter)
_MAKE_FX = torch._C._TorchDispatchModeKey.PROXY


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for a batch of others: of ``torch.func.vmap``, or of ``is_grads_batched=True``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def tracing_reason(who: str, *, is_operator: bool = False) -> str:
    """A transformation of PyTorch's is active; asked before sizes are looked at. With `is_operator` torch.compile is no
    reason: `who` are operators."""
    # Before compiling, which may be of a function that transforms another.
    if torch._C._are_functorch_transforms_active():
        return f"a torch.func transformation is active; {who} have no rule for it"
    # Not is_exporting(), which Dynamo of torch 2.8 to 2.11 takes to be true under torch.compile as well.
    if torch.compiler._is_exporting_flag:
        return f"torch.export is tracing; a program that needs {who} would not run without this package"
    if torch.compiler.is_compiling():
        return "" if is_operator else f"torch.compile is tracing; {who} are no operators"
    if torch._C._get_dispatch_mode(_MAKE_FX) is not None:
        return f"make_fx is tracing; {who} would leave weights of today, or nothing, in its graph"
    if torch.jit.is_tracing():
        return f"torch.jit is tracing; {who} are not registered as operators"
    if forward_ad._current_level >= 0:
        return f"forward-mode differentiation is active; {who} have no tangents"
    return ""


def unit_reason(spec: SKSpec, who: str) -> str:
    """The unit has an activation that is not computed."""
    for part, act in (("branch_act", spec.branch_act), ("gate_act", spec.gate_act)):
        if act not in ("relu", "identity"):
            return f"{part} is {act}; {who} compute relu and identity"
    return ""


def norm_reason(norm: object, who: str, *, is_training: bool = False) -> str:
    """The norm does not fold into the convolution before it; the reason lacks its subject, the norm's name."""
    if type(norm) not in FOLDABLE_NORMS:
        verb = "compute" if is_training else "fold"
        return f"is a {type(norm).__name__}; {who} {verb} BatchNorm2d and SyncBatchNorm"
    if is_training:
        return ""
    assert isinstance(norm, nn.Module)
    if norm.training or norm._buffers["running_mean"] is None or norm._buffers["running_var"] is None:
        return f"uses batch statistics; {who} are for inference (layer.eval())"
    return ""


def state_reason(
    x: Tensor, branches: Sequence[Branch], gate: Gate, who: str, *, is_training: bool = False
) -> str:
    """A part of the unit, or the call, is not one of plain inference; with `is_training`, nor one of training."""
    # Asked at every call: nothing is formatted before there is a reason.
    for m, branch in enumerate(branches):
        parts = {"norm": branch.norm, "drop": branch.drop, "act": branch.act}
        if reason := _part_reason(parts, who, is_training) or _branch_reason(branch, who):
            return f"branches[{m}].{reason}"
    if reason := _part_reason({"norm": gate.norm, "act": gate.act}, who, is_training):
        return f"gate.{reason}"
    tensors = [x, *tensors_of(branches, gate)]
    for tensor in tensors:
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
            name = "x" if tensor is x else "a parameter"
            kind = type(tensor).__name__ if tensor.layout is torch.strided else tensor.layout
            return f"{name} is a {kind}; {who} take plain strided tensors"
    if not is_training and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return f"gradients are enabled; {who} are forward only (torch.no_grad() or torch.inference_mode())"
    return ""


def _part_reason(parts: Mapping[str, object], who: str, is_training: bool) -> str:
    norm = parts["norm"]
    if norm is not None and (reason := norm_reason(norm, who, is_training=is_training)):
        return f"norm {reason}"
    for name, module in parts.items():
        if isinstance(module, nn.Module):
            if any(hooks_of(module)):
                return f"{name} has forward or backward hooks, which {who} would not run"
            if "forward" in module.__dict__:
                return f"{name} has had its forward replaced, which {who} would not run"
    return ""


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The hooks that would run around a module's forward and backward pass, by kind."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def _branch_reason(branch: Branch, who: str) -> str:
    if branch.aa is not None:
        return f"aa is set; {who} have no anti-aliasing"
    drop = branch.drop
    if drop is None or type(drop) is nn.Identity:
        return ""
    if type(drop) not in _DROPS:
        return f"drop is a {type(drop).__name__}; {who} know it for no identity"
    if drop.training:  # type: ignore[attr-defined]
        return f"drop is active; {who} have no random numbers (layer.eval())"
    return ""
