"""Which implementation runs a call, with which configs, and why not another."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .backend import Backend, cannot_run, inference_schedule_reason
from .chips import AMD_COMPILES, CHIPS, chip_of
from .cpu import choice as cpu
from .environment import triton_version
from .layout import memory_format
from .pack_cache import PackCache
from .params import Branch, Gate
from .plan import Plan
from .planning import eager_passes
from .preference import inference_plan
from .reasons import state_reason, tracing_reason, unit_reason
from .replay.calls import Recorder
from .save import Save
from .schedules import cpu_folded, cpu_merged, cpu_train, cpu_train_merged
from .spec import SKSpec
from .training import run as training
from .training.plan import plan_training
from .workload import workload_of

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KERNELS = "the kernels"
_CPU_PREPARE = {"folded": cpu_folded.prepare, "merged": cpu_merged.prepare}
_CPU_TRAIN = {"train": cpu_train.run, "train_merged": cpu_train_merged.run}


def can_run_triton(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> tuple[bool, str]:
    """Whether the Triton kernels can run the unit on `x`; if not, the reason (else "")."""
    reason, _ = _kernels_reason(x, branches, gate, spec)
    return not reason, reason


def choose(
    x: Tensor,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    *,
    backend: Backend,
    save: Save = "branches",
) -> Plan:
    """The plan for a call under `backend`: "auto", "triton", "torch" or "reference".

    "auto" takes the kernels on a GPU where they can run. On a CPU it takes the CPU's schedules
    where they can run, even with ``TRITON_INTERPRET=1``; "triton" then runs the kernels through Triton's interpreter.
    `save` is what schedule "train" saves for the backward pass.

    Raises:
        RuntimeError: `backend` is "triton" or "torch" and it cannot run; the message holds the reason.
    """
    if backend == "reference":
        return reference_plan(x.dtype, spec, "the reference was requested")
    if backend == "torch" or (backend == "auto" and x.device.type == "cpu"):
        reason = cpu.reason(x, branches, gate, spec)
        if not reason:
            return cpu.plan(x, spec)
        if training.is_training(x, branches, gate):
            not_trained = cpu.training_reason(x, branches, gate, spec)
            if not not_trained:
                return cpu.plan(x, spec, is_training=True)
            if not_trained != reason:
                reason = f"{reason}; for training, {not_trained}"
        if backend == "torch":
            raise cannot_run(backend, reason)
        return reference_plan(x.dtype, spec, 'x is on "cpu", where "auto" takes no kernels', reason)
    if backend == "auto" and not torch.compiler.is_compiling() and is_interpreted():
        return reference_plan(x.dtype, spec, 'TRITON_INTERPRET is set, where "auto" takes the reference')
    reason, is_training = _kernels_reason(x, branches, gate, spec)
    if not reason:
        if is_training:
            return _training_plan(x, spec, save)
        if torch.compiler.is_compiling():  # the operator plans when it runs
            return Plan("triton", "traced", math.nan, x.dtype)
        return inference_plan(x, spec)
    if backend == "triton":
        raise cannot_run(backend, reason)
    return reference_plan(x.dtype, spec, reason)


def _training_plan(x: Tensor, spec: SKSpec, save: Save) -> Plan:
    if torch.compiler.is_compiling():  # the operator plans when it runs
        return Plan("triton", "train", math.nan, x.dtype)
    return plan_training(workload_of(x, spec), save)


def run(
    plan: Plan,
    x: Tensor,
    branches: Sequence[Branch],
    gate: Gate,
    spec: SKSpec,
    cache: PackCache | None,
    recorder: Recorder | None = None,
    save: Save = "branches",
) -> Tensor:
    """Run a plan whose backend is "triton" or "torch"; `recorder` takes note of what can be started again."""
    if (plan.backend, plan.schedule) == ("triton", "train"):
        # Without gradients, such a call is of no kind that is recorded: its kernels change what inference depends on.
        if recorder is not None and not recorder.has_gradients:
            recorder = None
        return training.run(x, branches, gate, spec, save, recorder)
    if (plan.backend, plan.schedule) == ("triton", "traced"):
        from .inference_op import run_inference_op

        return run_inference_op(x, branches, gate, spec)
    if plan.backend == "triton":
        from . import launching  # imports Triton

        return launching.run(plan, x, branches, gate, spec, cache, recorder)
    if plan.backend == "torch":
        if plan.schedule in _CPU_TRAIN:
            return _CPU_TRAIN[plan.schedule](plan, x, branches, gate, spec)
        if recorder is not None:
            recorder = None if recorder.has_gradients else recorder.watching()
        compute = _CPU_PREPARE[plan.schedule](plan, memory_format(x), branches, gate, spec, cache)
        v = compute(x)
        if recorder is not None:
            recorder.add(compute)
        return v
    raise ValueError(f"plan must have backend 'triton' or 'torch', got {plan.backend!r}")


def is_interpreted() -> bool:
    """Whether Triton kernels run through its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernels_reason(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> tuple[str, bool]:
    """Why the kernels cannot run the unit, "" if they can, and whether they would train it."""
    reason = (
        tracing_reason(_KERNELS, is_operator=True)
        or _device_reason(x.device, x.dtype)
        or unit_reason(spec, _KERNELS)
    )
    if reason:
        return reason, False
    reason = state_reason(x, branches, gate, _KERNELS)
    if not reason or not training.is_training(x, branches, gate):
        return reason, False
    reason = state_reason(x, branches, gate, _KERNELS, is_training=True)
    if not reason and not torch.compiler.is_compiling():  # the operator asks when it runs
        reason = inference_schedule_reason()
    return reason, True


def _device_reason(device: torch.device, dtype: torch.dtype) -> str:
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    if dtype not in KERNEL_DTYPES:
        return f"x has dtype {dtype}; the kernels take float16, bfloat16 and float32"
    if is_interpreted() and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bit patterns of bfloat16; take float16 or float32 there"
    if device.type == "cpu":
        if not is_interpreted():
            return 'x is on "cpu"; the kernels need a GPU, or TRITON_INTERPRET=1 to run interpreted'
        return ""
    if device.type != "cuda":
        return f'x is on "{device.type}"; the kernels run on CUDA and ROCm GPUs'
    if chip_of(device) is None:
        name = torch.cuda.get_device_name(device)
        return f"{name} is not supported; supported are {', '.join(CHIPS)}"
    if torch.version.hip and triton_version() < AMD_COMPILES:
        installed, first = (".".join(map(str, version)) for version in (triton_version(), AMD_COMPILES))
        return f"Triton {installed} does not compile the kernels for AMD; {first} and later do"
    return ""


# What ``torch.compiler.assume_constant_result`` does; that imports Dynamo, and with it Triton, at once.
_device_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reference_plan(dtype: torch.dtype, spec: SKSpec, reason: str, torch_reason: str = "") -> Plan:
    """The reference, why not the kernels, and on a CPU why not its schedules."""
    rejected = (("triton", reason), ("torch", torch_reason)) if torch_reason else (("triton", reason),)
    return Plan("reference", "eager", eager_passes(spec), dtype, rejected=rejected)
