"""Which implementation runs a call, with which configs, and why not another."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .backend import current_schedule
from .chips import CHIPS, chip_of
from .environment import triton_version
from .packing import PackCache
from .params import Branch, Gate
from .plan import Plan
from .plans import eager_passes, fastest_plan, plan_schedule
from .spec import SKSpec

# Identities outside of training.
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Channels per group up to which the convolution is bound by memory, so that fusing it pays.
MAX_AUTO_CHANNELS = 64


def can_run_triton(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> tuple[bool, str]:
    """Whether the Triton kernels can run the unit on `x`; if not, the reason (else "")."""
    reason = _tracing_reason(x) or _device_reason(x) or _unit_reason(spec) or _state_reason(x, branches, gate)
    return not reason, reason


def choose(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, *, backend: str) -> Plan:
    """The plan for a call under `backend`: "auto", "triton" or "reference".

    "auto" takes the kernels on a GPU where they can run and are expected to pay. On a CPU it takes the reference, even
    with ``TRITON_INTERPRET=1``; "triton" then runs the kernels through Triton's interpreter.

    Raises:
        RuntimeError: `backend` is "triton" and the kernels cannot run; the message holds the reason.
    """
    if backend == "reference":
        return _reference_plan(x.dtype, spec, "the reference was requested")
    if backend == "auto" and x.device.type == "cpu":
        return _reference_plan(x.dtype, spec, 'x is on "cpu", where "auto" takes the reference')
    if backend == "auto" and not torch.compiler.is_compiling() and is_interpreted():
        return _reference_plan(x.dtype, spec, 'TRITON_INTERPRET is set, where "auto" takes the reference')
    can_run, reason = can_run_triton(x, branches, gate, spec)
    if can_run and backend == "auto":
        reason = _slower_reason(spec)
    if not reason:
        n, _, h_in, w_in = x.shape
        chip = chip_of(x.device)
        assert chip is not None
        size = (n, h_in, w_in, x.dtype, allows_tf32(), chip, x.stride(1) != 1)
        schedule = current_schedule()
        if schedule is not None:
            return plan_schedule(schedule, spec, *size)
        return fastest_plan(spec, *size)
    if backend == "triton":
        raise RuntimeError(f'use_backend("triton") cannot run here: {reason}')
    return _reference_plan(x.dtype, spec, reason)


def run(
    plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, cache: PackCache | None
) -> Tensor:
    """Run a plan whose backend is "triton"."""
    from .schedules import recompute, store

    schedules = {"store": store.run, "recompute": recompute.run}
    if plan.backend != "triton" or plan.schedule not in schedules:
        raise ValueError(
            f"plan must have backend 'triton' and a schedule of {list(schedules)}, "
            f"got {plan.backend}/{plan.schedule}"
        )
    return schedules[plan.schedule](plan, x, branches, gate, spec, cache)


def allows_tf32() -> bool:
    """Whether PyTorch's own switches let fp32 convolutions round their operands to TF32; never on ROCm."""
    if torch.version.hip:
        return False
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is None or precision == "none":
        return torch.backends.cudnn.allow_tf32
    return precision == "tf32"


def is_interpreted() -> bool:
    """Whether Triton kernels run through its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _tracing_reason(x: Tensor) -> str:
    """Why a call under a transformation of PyTorch's cannot run the kernels; asked before sizes are looked at."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing; the kernels are not registered as operators yet"
    if torch.jit.is_tracing():
        return "torch.jit is tracing; the kernels are not registered as operators"
    if torch._C._functorch.maybe_current_level() is not None:
        return "a torch.func transformation is active; the kernels have no rule for it"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active; the kernels have no tangents"
    return ""


def _device_reason(x: Tensor) -> str:
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}; the kernels take float16, bfloat16 and float32"
    if is_interpreted() and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bit patterns of bfloat16; take float16 or float32 there"
    if x.device.type == "cpu":
        if not is_interpreted():
            return 'x is on "cpu"; the kernels need a GPU, or TRITON_INTERPRET=1 to run interpreted'
        return ""
    if x.device.type != "cuda":
        return f'x is on "{x.device.type}"; the kernels run on CUDA and ROCm GPUs'
    if chip_of(x.device) is None:
        name = torch.cuda.get_device_name(x.device)
        return f"{name} is not supported; supported are {', '.join(CHIPS)}"
    if torch.version.hip and triton_version() < (3, 5):
        return f"Triton {'.'.join(map(str, triton_version()))} does not compile the kernels for AMD; 3.5 and later do"
    return ""


@lru_cache
def _unit_reason(spec: SKSpec) -> str:
    for part, act in (("branch_act", spec.branch_act), ("gate_act", spec.gate_act)):
        if act not in ("relu", "identity"):
            return f"{part} is {act}; the kernels compute relu and identity"
    return ""


@lru_cache
def _slower_reason(spec: SKSpec) -> str:
    """Why "auto" leaves a unit that the kernels could run to the reference."""
    widest = max(max(spec.branch_in_channels, spec.out_channels) // branch.groups for branch in spec.branches)
    if widest > MAX_AUTO_CHANNELS:
        return (
            f"a branch has {widest} channels per group; above {MAX_AUTO_CHANNELS} the library's convolution is "
            'expected to be faster (use_backend("triton") runs the kernels all the same)'
        )
    return ""


def _state_reason(x: Tensor, branches: Sequence[Branch], gate: Gate) -> str:
    norms = [(f"branches[{m}].norm", branch.norm) for m, branch in enumerate(branches)]
    for name, norm in (*norms, ("gate.norm", gate.norm)):
        if norm is None:
            continue
        if not isinstance(norm, nn.Module) or type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return f"{name} is a {type(norm).__name__}; the kernels fold BatchNorm2d and SyncBatchNorm"
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return f"{name} uses batch statistics; the kernels are for inference (layer.eval())"
    acts = [(f"branches[{m}].act", branch.act) for m, branch in enumerate(branches)]
    for name, module in (*norms, *acts, ("gate.norm", gate.norm), ("gate.act", gate.act)):
        if isinstance(module, nn.Module) and (module._forward_hooks or module._forward_pre_hooks):
            return f"{name} has forward hooks, which the kernels would not run"
    for m, branch in enumerate(branches):
        if branch.aa is not None:
            return f"branches[{m}].aa is set; the kernels have no anti-aliasing"
        if branch.drop is None or type(branch.drop) is nn.Identity:
            continue
        if type(branch.drop) not in _DROPS:
            return (
                f"branches[{m}].drop is a {type(branch.drop).__name__}; the kernels know it for no identity"
            )
        if branch.drop.training:  # type: ignore[attr-defined]
            return f"branches[{m}].drop is active; the kernels are for inference (layer.eval())"
    needs_grad = x.requires_grad
    for name, tensor in (("x", x), *(("a parameter", t) for t in _tensors(branches, gate))):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            kind = type(tensor).__name__ if tensor.layout is torch.strided else tensor.layout
            return f"{name} is a {kind}; the kernels take plain strided tensors"
        needs_grad |= tensor.requires_grad
    if needs_grad and torch.is_grad_enabled():
        return (
            "gradients are enabled; the kernels are forward only (torch.no_grad() or torch.inference_mode())"
        )
    return ""


def _tensors(branches: Sequence[Branch], gate: Gate) -> Iterable[Tensor]:
    for branch in branches:
        yield branch.weight
        if branch.bias is not None:
            yield branch.bias
    yield gate.reduce_weight
    yield from gate.select_weight
    for part in (*(b.norm for b in branches), gate.norm):
        if isinstance(part, nn.Module):
            yield from part.parameters(recurse=False)
            yield from part.buffers(recurse=False)
    if gate.reduce_bias is not None:
        yield gate.reduce_bias
    yield from gate.select_bias or ()


@lru_cache(maxsize=1024)
def _reference_plan(dtype: torch.dtype, spec: SKSpec, reason: str) -> Plan:
    return Plan("reference", "eager", eager_passes(spec), dtype, rejected=(("triton", reason),))
