"""Why a call cannot take a path made for inference; what all such paths, on any device, have in common.

Each function returns the reason, or "". `who` is the subject of its sentence: "the kernels".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .params import Branch, Gate
from .spec import SKSpec

FOLDABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Identities outside of training.
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def tracing_reason(who: str) -> str:
    """A transformation of PyTorch's is active; asked before sizes are looked at."""
    if torch.compiler.is_compiling():
        return f"torch.compile is tracing; {who} are not registered as operators yet"
    if torch.jit.is_tracing():
        return f"torch.jit is tracing; {who} are not registered as operators"
    if torch._C._functorch.maybe_current_level() is not None:
        return f"a torch.func transformation is active; {who} have no rule for it"
    if forward_ad._current_level >= 0:
        return f"forward-mode differentiation is active; {who} have no tangents"
    return ""


@lru_cache
def unit_reason(spec: SKSpec, who: str) -> str:
    """The unit has an activation that is not computed."""
    for part, act in (("branch_act", spec.branch_act), ("gate_act", spec.gate_act)):
        if act not in ("relu", "identity"):
            return f"{part} is {act}; {who} compute relu and identity"
    return ""


def norm_reason(name: str, norm: object, who: str) -> str:
    """The norm `name` does not fold into the convolution before it."""
    if type(norm) not in FOLDABLE_NORMS:
        return f"{name} is a {type(norm).__name__}; {who} fold BatchNorm2d and SyncBatchNorm"
    assert isinstance(norm, nn.Module)
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return f"{name} uses batch statistics; {who} are for inference (layer.eval())"
    return ""


def state_reason(x: Tensor, branches: Sequence[Branch], gate: Gate, who: str) -> str:
    """A part of the unit, or the call, is not one of plain inference."""
    norms = [(f"branches[{m}].norm", branch.norm) for m, branch in enumerate(branches)]
    for name, norm in (*norms, ("gate.norm", gate.norm)):
        if norm is not None and (reason := norm_reason(name, norm, who)):
            return reason
    acts = [(f"branches[{m}].act", branch.act) for m, branch in enumerate(branches)]
    for name, module in (*norms, *acts, ("gate.norm", gate.norm), ("gate.act", gate.act)):
        if isinstance(module, nn.Module) and (module._forward_hooks or module._forward_pre_hooks):
            return f"{name} has forward hooks, which {who} would not run"
    for m, branch in enumerate(branches):
        if branch.aa is not None:
            return f"branches[{m}].aa is set; {who} have no anti-aliasing"
        if branch.drop is None or type(branch.drop) is nn.Identity:
            continue
        if type(branch.drop) not in _DROPS:
            return f"branches[{m}].drop is a {type(branch.drop).__name__}; {who} know it for no identity"
        if branch.drop.training:  # type: ignore[attr-defined]
            return f"branches[{m}].drop is active; {who} are for inference (layer.eval())"
    needs_grad = x.requires_grad
    for name, tensor in (("x", x), *(("a parameter", t) for t in _tensors(branches, gate))):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            kind = type(tensor).__name__ if tensor.layout is torch.strided else tensor.layout
            return f"{name} is a {kind}; {who} take plain strided tensors"
        needs_grad |= tensor.requires_grad
    if needs_grad and torch.is_grad_enabled():
        return f"gradients are enabled; {who} are forward only (torch.no_grad() or torch.inference_mode())"
    return ""


def _tensors(branches: Sequence[Branch], gate: Gate) -> Iterable[Tensor]:
    for branch in branches:
        yield branch.weight
        if branch.bias is not None:
            yield branch.bias
    yield gate.reduce_weight
    yield from gate.select_weight
    for part in (*(b.norm for b in branches), gate.norm):
        if isinstance(part, nn.Module):  # by the dictionaries: nn.Module's generators show at batch 1
            yield from (t for t in (*part._parameters.values(), *part._buffers.values()) if t is not None)
    if gate.reduce_bias is not None:
        yield gate.reduce_bias
    yield from gate.select_bias or ()
