"""`sk-triton traffic`: the bytes each kernel asks for and the distinct bytes it touches, counted by interpreting."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sk_triton import SKSpec
from sk_triton.backend import SCHEDULES
from sk_triton.chips import CHIPS
from sk_triton.environment import require
from sk_triton.exit_codes import BAD_USAGE, FAILED
from sk_triton.layout import empty_output
from sk_triton.library import Convolution
from sk_triton.plan import BranchLaunch
from sk_triton.save import SAVES, Save
from sk_triton.workload import Workload

from .compiled.planned import unit_parameters
from .grid import classic_unit, paper_unit
from .shapes import CLASSIC, PAPER

if TYPE_CHECKING:
    import numpy as np

    from sk_triton.kernels.launch import Launch  # imports Triton


TRAIN = "train"
DEFAULT_SAVE: Save = "branches"


@dataclass
class Traffic:
    """Counts for one tensor under one launch, in bytes."""

    kernel: str
    tensor: str
    read: int = 0
    written: int = 0
    touched: int = 0

    @property
    def requested(self) -> int:
        return self.read + self.written


class Meter:
    """Counts accesses per tensor while the interpreter runs kernels inside :meth:`watch`.

    An access outside of every tensor's storage raises ``IndexError``: on a GPU it would be a fault, or worse, nothing.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        self._storages: dict[int, tuple[str, int]] = {}
        """Name and size of each storage, by its address."""
        for name, value in tensors.items():
            for tensor in (value,) if isinstance(value, Tensor) else value:
                storage = tensor.untyped_storage()
                self._storages.setdefault(storage.data_ptr(), (name, storage.nbytes()))
        self._rows: dict[str, Traffic] = {}
        self._touched: dict[int, np.ndarray] = {}

    @contextlib.contextmanager
    def watch(self, kernel: str = "") -> Iterator[list[Traffic]]:
        """Count what runs inside; the list that is handed out is filled at the end, one row per tensor used."""
        from triton.runtime.interpreter import InterpreterBuilder

        self._rows = {name: Traffic(kernel, name) for name, _ in self._storages.values()}
        self._touched = {}
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def metered_load(builder, ptrs, mask, *args, **kwargs):
            self._count(ptrs, mask, is_write=False)
            return load(builder, ptrs, mask, *args, **kwargs)

        def metered_store(builder, ptrs, value, mask, *args, **kwargs):
            self._count(ptrs, mask, is_write=True)
            return store(builder, ptrs, value, mask, *args, **kwargs)

        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = (
            metered_load,
            metered_store,
        )
        result: list[Traffic] = []
        try:
            yield result
        finally:
            InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        for address, touched in self._touched.items():
            self._rows[self._storages[address][0]].touched += int(touched.sum())
        result.extend(row for row in self._rows.values() if row.requested)

    def _count(self, ptrs: Any, mask: Any, *, is_write: bool) -> None:
        import numpy as np

        size = ptrs.get_element_ty().primitive_bitwidth // 8
        # A mask and a scalar condition make integers of it, which would count as indices.
        wanted = mask.data.astype(bool)
        addresses = np.broadcast_to(ptrs.data, wanted.shape)[wanted].astype(np.int64).reshape(-1)
        found = 0
        for address, (name, nbytes) in self._storages.items():
            offsets = addresses - address
            offsets = offsets[(offsets >= 0) & (offsets + size <= nbytes)]
            if not offsets.size:
                continue
            found += offsets.size
            row = self._rows[name]
            if is_write:
                row.written += offsets.size * size
            else:
                row.read += offsets.size * size
            touched = self._touched.setdefault(address, np.zeros(nbytes, bool))
            for byte in range(size):
                touched[offsets + byte] = True
        if found != addresses.size:
            raise IndexError(f"{addresses.size - found} accesses outside of every tensor")


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
    from sk_triton.launching import prepare
    from sk_triton.packing import pack

    if not dispatch.is_interpreted():
        raise RuntimeError(
            "traffic is counted by Triton's interpreter: set TRITON_INTERPRET=1 before the first import"
        )
    workload = _workload(spec, size)
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
    packed = pack(plan, size, size, *unit_parameters(spec, random), None)
    v = empty_output(x, spec)
    steps = prepare(plan, x, v, packed, spec)
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

    from .compiled.training_steps import take_step

    workload = _workload(spec, size)
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


def _workload(spec: SKSpec, size: int) -> Workload:
    return Workload(spec, 128, size, size, torch.float16, CHIPS["sm_90"])


def _with_configs(
    launches: tuple[BranchLaunch, ...], others: tuple[BranchLaunch, ...]
) -> tuple[BranchLaunch, ...]:
    return tuple(replace(launch, config=other.config) for launch, other in zip(launches, others, strict=True))


def _metered(launch: Launch, run: Callable[[], object]) -> list[Traffic]:
    """Runs a launch and counts what it moves."""
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    task = launch.constexprs.get("TASK", "store")
    kernel = launch.kernel.fn.__name__.removesuffix("_kernel").removesuffix("_fwd")
    labels = {**_LABELS, "out_ptr": _OUTPUTS.get(task, "u")}
    if kernel.startswith("branch_grad"):
        labels["partial_ptr"] = "partial dw"
    # A pointer that the task does not follow repeats another tensor, which keeps its own name.
    tensors = {
        labels.get(name, name.removesuffix("_ptr")): t for name, t in named if isinstance(t, Tensor | tuple)
    }
    with Meter(tensors).watch(kernel if task == "store" else f"{kernel}, {task}") as found:
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
UNITS = {PAPER: STAGES, CLASSIC: _stages(classic_unit)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sk-triton traffic`."""
    parser.add_argument(
        "--stage", type=int, choices=tuple(STAGES), default=1, help="stage of SKNet-50 (default 1)"
    )
    parser.add_argument(
        "--schedule",
        choices=(*SCHEDULES, TRAIN),
        default="recompute",
        help=f"default: recompute; {TRAIN}: forward and backward",
    )
    parser.add_argument(
        "--unit",
        choices=tuple(UNITS),
        default=PAPER,
        help=f"default: the paper's; {CLASSIC}: linear branches",
    )
    parser.add_argument("--save", choices=SAVES, help=f"what {TRAIN} saves (default {DEFAULT_SAVE})")


def run(args: argparse.Namespace) -> int:
    """Prints the table of one unit; returns 2 for a schedule that cannot run it, or an option without effect."""
    require("rich", "numpy", "triton")
    from sk_triton import dispatch

    try:
        refuse(args)
    except ValueError as error:
        print(f"sk-triton traffic: {error}", file=sys.stderr)
        return BAD_USAGE
    if not dispatch.is_interpreted():
        return _interpreted(args)
    from rich.console import Console
    from rich.table import Table

    full, spec, n, size = UNITS[args.unit][args.stage]
    if args.schedule == TRAIN:
        rows, unit = count_training(spec, n, size, full, args.save or DEFAULT_SAVE)
    else:
        rows, unit = count(spec, n, size, full, args.schedule)
    table = Table(
        title=f"Schedule {_title(args)}, {args.unit} unit, stage {args.stage} of SKNet-50, in passes over one "
        "activation tensor (T)"
    )
    for title in ("kernel", "tensor"):
        table.add_column(title)
    for title in ("requested", "distinct"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.kernel, row.tensor, f"{row.requested / unit:.2f}", f"{row.touched / unit:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"activations {passes(rows, unit):.2f} T, sums by tile or sample {passes(rows, unit, SUMS):.2f} T, all "
        "distinct bytes"
    )
    console.print(
        f"counted on {n} sample of {spec.out_channels} of {full.out_channels} channels, as many a group: weights weigh "
        "more than in a batch"
    )
    return 0


def _interpreted(args: argparse.Namespace) -> int:
    """Runs the command in a process of its own: Triton reads the switch when a kernel is defined."""
    options = ("stage", "schedule", "unit", "save")
    given = [f"--{name}={getattr(args, name)}" for name in options if getattr(args, name) is not None]
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "sk_triton", "traffic", *given],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    return done.returncode if done.returncode >= 0 else FAILED  # below 0: a signal ended it


def refuse(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that has no effect, and for a schedule that cannot run the unit."""
    if args.schedule == TRAIN:
        return
    if args.save:
        raise ValueError(f"--save acts on --schedule {TRAIN}, got --schedule {args.schedule}")
    from sk_triton import planning

    full, spec, _, size = UNITS[args.unit][args.stage]
    for each in (full, spec):
        if reason := planning.refusal(args.schedule, _workload(each, size)):
            raise ValueError(
                f"schedule {args.schedule!r} cannot run the {args.unit} unit of stage {args.stage}: {reason}"
            )


def _title(args: argparse.Namespace) -> str:
    return f"{TRAIN}, saving {args.save or DEFAULT_SAVE}" if args.schedule == TRAIN else args.schedule
