"""Which implementation runs a call, with which configs, and why not another."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .chips import CHIPS, Chip, chip_of
from .environment import version
from .packing import PackCache
from .params import Branch, Gate
from .plan import BranchLaunch, MergedLaunch, Plan
from .spec import BranchSpec, SKSpec

if TYPE_CHECKING:
    from .kernels.geometry import ConvShape

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
        return plan_store(spec, n, h_in, w_in, x.dtype, allows_tf32(), chip, is_converted=x.stride(1) != 1)
    if backend == "triton":
        raise RuntimeError(f'use_backend("triton") cannot run here: {reason}')
    return _reference_plan(x.dtype, spec, reason)


def run(
    plan: Plan, x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec, cache: PackCache | None
) -> Tensor:
    """Run a plan whose backend is "triton"."""
    from .schedules import merged, store

    if plan.backend == "triton" and plan.schedule == "merged":
        return merged.run(plan, x, branches, gate, spec, cache)
    if plan.backend != "triton" or plan.schedule != "store":
        raise ValueError(
            f"plan must have backend 'triton' and schedule 'store', got {plan.backend}/{plan.schedule}"
        )
    return store.run(plan, x, branches, gate, spec, cache)


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
def triton_version() -> tuple[int, int]:
    """Major and minor version of the installed Triton, under either name of its distribution; (0, 0) without one."""
    text = version("triton") or version("pytorch-triton-rocm") or "0.0"
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


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
def plan_store(
    spec: SKSpec,
    n: int,
    h_in: int,
    w_in: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    chip: Chip,
    is_converted: bool = False,
) -> Plan:
    """The plan of schedule "store" for a batch of `n` inputs of `h_in` x `w_in` pixels on `chip`.

    `is_converted`: the input's channels are not adjacent, so that it is copied first.
    """
    from . import analytic, tuning
    from .kernels.geometry import ConvShape

    h, w = spec.output_size(h_in, w_in)
    launches: list[BranchLaunch] = []
    for _, group in groupby(enumerate(spec.branches), key=lambda item: item[1].groups):
        members: list[tuple[int, BranchSpec]] = list(group)
        start, stop = members[0][0], members[-1][0] + 1
        shape = ConvShape(
            c_in=spec.branch_in_channels,
            c_out=spec.out_channels,
            groups=members[0][1].groups,
            kernels=tuple(branch.kernel_size for _, branch in members),
            dilations=tuple(branch.dilation for _, branch in members),
            stride=spec.stride,
            is_split=spec.split_input,
        )
        config, source = tuning.branch_config(shape, n, h, w, dtype, allow_tf32, chip)
        launches.append(BranchLaunch(start, stop, shape, config, source))
    m = spec.num_branches
    return Plan(
        backend="triton",
        schedule="store",
        passes=(len(launches) + 2 * is_converted) * _input_passes(spec, h_in, w_in) + 2 * m + 1,
        dtype=dtype,
        rejected=(("reference", f"the kernels can run; eager takes {_eager_passes(spec)} passes"),),
        branch_launches=tuple(launches),
        gate=analytic.gate_config(m, spec.out_channels, spec.gate_width, dtype),
        select=analytic.select_config(h * w, spec.out_channels),
        has_relu=spec.branch_act == "relu",
        gate_has_relu=spec.gate_act == "relu",
        allow_tf32=allow_tf32 and dtype == torch.float32,
    )


@lru_cache(maxsize=1024)
def merged_reason(spec: SKSpec, dtype: torch.dtype, allow_tf32: bool) -> str:
    """Why schedule "merged" cannot run a unit that the kernels can; "" if it can."""
    from . import analytic
    from .kernels.merging import merged_shape

    if spec.branch_act != "identity":
        return f"branch_act is {spec.branch_act}; only linear branches merge into one convolution"
    if spec.split_input:
        return "split_input is set; branches of different inputs do not merge"
    groups = {branch.groups for branch in spec.branches}
    if len(groups) > 1:
        return f"the branches have {sorted(groups)} groups; only equal groups merge"
    if dtype == torch.float32 and not allow_tf32:
        return "fp32 is IEEE; products without tensor cores leave no registers for the merged weights"
    shape = merged_shape(_branches_shape(spec))
    width = max(shape.c_in, shape.c_out) // shape.groups
    if width > analytic.MAX_MERGED_CHANNELS:
        return (
            f"a group has {width} channels; above {analytic.MAX_MERGED_CHANNELS} weights of each sample's own cost "
            "more than the passes that they save"
        )
    registers = analytic.merged_registers(shape, dtype)
    if registers > analytic.MAX_MERGED_REGISTERS:
        return (
            f"merged weights on a {shape.kernels[0]} x {shape.kernels[0]} lattice take {registers} registers; "
            f"at most {analytic.MAX_MERGED_REGISTERS} are left"
        )
    return ""


@lru_cache(maxsize=1024)
def plan_merged(
    spec: SKSpec,
    n: int,
    h_in: int,
    w_in: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    chip: Chip,
    is_converted: bool = False,
) -> Plan:
    """The plan of schedule "merged"; arguments as :func:`plan_store`.

    Raises:
        ValueError: the schedule cannot run the unit; the message is that of :func:`merged_reason`.
    """
    from . import analytic
    from .kernels.merging import merged_shape

    reason = merged_reason(spec, dtype, allow_tf32)
    if reason:
        raise ValueError(f"schedule merged cannot run the unit: {reason}")
    branches = _branches_shape(spec)
    shape = merged_shape(branches)
    h, w = spec.output_size(h_in, w_in)
    return Plan(
        backend="triton",
        schedule="merged",
        passes=(2 + 2 * is_converted) * _input_passes(spec, h_in, w_in) + 1,
        dtype=dtype,
        gate=analytic.gate_config(spec.num_branches, spec.out_channels, spec.gate_width, dtype),
        merged=MergedLaunch(
            branches,
            shape,
            analytic.border_config(shape, n, h_in, w_in, chip),
            analytic.merged_config(shape, n, h, w, dtype, chip),
        ),
        gate_has_relu=spec.gate_act == "relu",
        allow_tf32=allow_tf32 and dtype == torch.float32,
    )


def _branches_shape(spec: SKSpec) -> ConvShape:
    """The shape of all branches in one launch; their groups are equal."""
    from .kernels.geometry import ConvShape

    return ConvShape(
        c_in=spec.branch_in_channels,
        c_out=spec.out_channels,
        groups=spec.branches[0].groups,
        kernels=tuple(branch.kernel_size for branch in spec.branches),
        dilations=tuple(branch.dilation for branch in spec.branches),
        stride=spec.stride,
        is_split=spec.split_input,
    )


@lru_cache(maxsize=1024)
def _reference_plan(dtype: torch.dtype, spec: SKSpec, reason: str) -> Plan:
    return Plan("reference", "eager", _eager_passes(spec), dtype, rejected=(("triton", reason),))


def _input_passes(spec: SKSpec, h_in: int, w_in: int) -> float:
    """The input's elements in units of the output's."""
    h, w = spec.output_size(h_in, w_in)
    return spec.in_channels * h_in * w_in / (spec.out_channels * h * w)


def _eager_passes(spec: SKSpec) -> float:
    """Passes of the reference in eager mode: each operator reads its inputs and writes its result.

    An input of another size than the output counts as one pass per branch all the same.
    """
    m = spec.num_branches
    split = 2 + 2 * spec.branch_norm + 2 * (spec.branch_act != "identity")
    fuse = 3 * (m - 1) + 1
    select = 2 * m + 3 * (m - 1)
    return m * split + fuse + select
