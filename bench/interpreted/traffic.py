"""The traffic of a whole unit, launch by launch, in inference and in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sk_triton import SKSpec
from sk_triton.chips import CHIPS
from sk_triton.library import Convolution
from sk_triton.plan import BranchLaunch
from sk_triton.save import Save
from sk_triton.workload import Workload

from ..compiled.planned import prepared_steps, unit_parameters
from ..compiled.resources import kernel_name
from ..grid import classic_unit, paper_unit
from ..shapes import CLASSIC, PAPER
from .meter import Meter, Traffic

if TYPE_CHECKING:
    from sk_triton.kernels.launch import Launch  # imports Triton

DEFAULT_SAVE: Save = "branches"


def count(
    spec: SKSpec, n: int, size: int, full: SKSpec | None = None, schedule: str = "store"
) -> tuple[list[Traffic], int]:
    """fp16 traffic of a schedule on `n` inputs of `size` x `size` pixels, and T, the bytes of one output.

    The configs are those of a batch of 128 of the unit `full` (default: `spec`), so that a few of its channels, as many
    per group, can stand for all of them.

    Raises:
        RuntimeError: the kernels were imported without ``TRITON_INTERPRET=1``.
    """
    from sk_triton import dispatch, planning
    from sk_triton.kernels.launch import Launch

    if not dispatch.is_interpreted():
        raise RuntimeError(
            "traffic is counted by Triton's interpreter: set TRITON_INTERPRET=1 before the first import"
        )
    workload = batch_workload(spec, size)
    plan = planning.plan_schedule(schedule, workload)
    if full is not None:
        planned = planning.plan_schedule(schedule, replace(workload, spec=full))
        launches = _with_configs(plan.branch_launches, planned.branch_launches)
        merged = planned.merged_launch
        if plan.merged_launch and merged:
            merged = replace(plan.merged_launch, border=merged.border, conv=merged.conv)
        plan = replace(
            plan,
            branch_launches=launches,
            merged_launch=merged,
            resident=planned.resident,
            reduction=planned.reduction,
        )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(workload.dtype)

    x = random(n, spec.in_channels, size, size).to(memory_format=torch.channels_last)
    steps, v = prepared_steps(plan, x, *unit_parameters(spec, random), spec)
    rows: list[Traffic] = []
    for step in steps:
        if isinstance(step, Convolution):
            step()
            rows.extend(_of_library(step))
            continue
        if not isinstance(step, Launch):
            raise ValueError(
                f"spec on {size} x {size} pixels needs a step outside the kernels, which is not counted"
            )
        rows.extend(_metered(step, step.__call__))
    return rows, v.numel() * v.element_size()


def count_training(
    spec: SKSpec, n: int, size: int, full: SKSpec | None = None, save: Save = DEFAULT_SAVE
) -> tuple[list[Traffic], int]:
    """As :func:`count`, of a training step: the launches of the forward, then those of the backward pass. What the
    library's convolutions and their gradients move is not counted."""
    from sk_triton.training.plan import plan_training

    from ..compiled.training_steps import take_step

    workload = batch_workload(spec, size)
    plan = plan_training(workload, save)
    if full is not None:
        planned = plan_training(replace(workload, spec=full), save)
        plan = replace(
            planned,
            branch_launches=_with_configs(plan.branch_launches, planned.branch_launches),
            folded_launches=_with_configs(plan.folded_launches, planned.folded_launches),
        )
    generator = torch.Generator().manual_seed(0)
    rows: list[Traffic] = []
    v = take_step(
        replace(workload, n=n),
        plan,
        save,
        lambda *shape: torch.randn(shape, generator=generator).half(),
        lambda launch, run: rows.extend(_metered(launch, run)),
    )
    return rows, v.numel() * v.element_size()


def batch_workload(spec: SKSpec, size: int) -> Workload:
    """What is planned to be counted: 128 samples in fp16 on an H100, of which a few are run."""
    return Workload(spec, 128, size, size, torch.float16, CHIPS["sm_90"])


def _with_configs(
    launches: tuple[BranchLaunch, ...], others: tuple[BranchLaunch, ...]
) -> tuple[BranchLaunch, ...]:
    return tuple(replace(launch, config=other.config) for launch, other in zip(launches, others, strict=True))


def _metered(launch: Launch, run: Callable[[], object]) -> list[Traffic]:
    """Runs a launch and counts what it moves."""
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    task = launch.constexprs.get("TASK", "store")
    labels = {**_LABELS, "out_ptr": _OUTPUTS.get(task, "u")}
    name = kernel_name(launch)
    if name.startswith("branch_grad"):
        labels["partial_ptr"] = "partial dw"
    # A pointer that the task does not follow repeats another tensor, which keeps its own name.
    tensors = {
        labels.get(key, key.removesuffix("_ptr")): t for key, t in named if isinstance(t, Tensor | tuple)
    }
    with Meter(tensors).watch(name) as found:
        run()
    return found


def _of_library(step: Convolution) -> list[Traffic]:
    """A convolution outside of the interpreter: each tensor once, and the copy of an input that is a slice."""
    rows = [Traffic("library", "x"), Traffic("library", "branch weights"), Traffic("library", "u")]
    x, weight, y = (tensor.numel() * tensor.element_size() for tensor in (step.x, step.weight, step.y))
    rows[0].read, rows[0].written = x + step.copied_bytes // 2, step.copied_bytes // 2
    rows[1].read, rows[2].written = weight, y
    for row in rows:
        row.touched = row.requested
    return rows


_LABELS = {
    "w_ptr": "branch weights", "reduce_ptr": "reduce weight", "select_ptr": "select weight",
    "u_ptrs": "u", "y_ptrs": "u",
}  # fmt: skip
_OUTPUTS = {"select": "v", "train": "y"}
ACTIVATIONS = ("x", "u", "v", "y", "dv", "dx", "dy")
SUMS = ("partial", "moments", "attention", "active", "pooled", "grad", "scaled", "terms")


def passes(rows: list[Traffic], unit: int, tensors: tuple[str, ...] = ACTIVATIONS) -> float:
    """Distinct bytes of the activations, or of other tensors, in units of T."""
    return sum(row.touched for row in rows if row.tensor in tensors) / unit


def _stages(unit: Callable[..., SKSpec]) -> dict[int, tuple[SKSpec, SKSpec, int, int]]:
    """The SKNet-50 stages, each by a few of its channels: (full unit, interpreted unit, batch, size)."""
    return {
        1: (unit(128), unit(16, groups=4), 1, 56),
        2: (unit(256), unit(16, groups=2), 1, 28),
        3: (unit(512), unit(32, groups=2), 1, 14),
        4: (unit(1024), unit(64, groups=2), 1, 7),
    }


STAGES = _stages(paper_unit)
COUNTED = {PAPER: STAGES, CLASSIC: _stages(classic_unit)}
"""The stages of each unit."""
