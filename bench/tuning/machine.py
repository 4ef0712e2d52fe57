"""Runs candidates on a device: right results first, against float64, then time from a cold L2."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sk_triton import reference
from sk_triton.params import Branch, Gate
from sk_triton.tuning.entries import Choice
from sk_triton.workload import Workload

from .. import judge, protocol
from ..planned import prepared_steps, unit_parameters
from .targets import Settled, Target

BUDGET = protocol.Budget(warmup_seconds=0.2, seconds=0.4, min_rounds=15, max_rounds=200)
"""For all candidates of a launch together."""


class Device:
    """A device, as :class:`.flow.Machine`. One unit's tensors are on it at a time, and one target's launches."""

    def __init__(self, device: torch.device, budget: protocol.Budget = BUDGET, seed: int = 0) -> None:
        self.device, self.budget, self.seed = device, budget, seed
        self.timer = protocol.timer_for(device)
        self._subject: _Subject | None = None
        self._target: Target | None = None
        self._settled: Settled = {}
        self._calls: dict[Choice, Callable[[], object]] = {}

    def now(self) -> float:
        return self.timer.now()

    def begin(self, target: Target, settled: Settled) -> None:
        self._calls = {}
        self._target, self._settled = target, dict(settled)
        if self._subject is None or self._subject.workload != target.workload:
            self._subject = None  # frees its tensors before the next one's are made
            self._subject = _Subject(target.workload, self.device, self.seed)

    def wrong(self, choice: Choice) -> str:
        assert self._target is not None
        assert self._subject is not None
        subject, target = self._subject, self._target
        plan = target.plan(choice, self._settled)
        steps, v = prepared_steps(plan, subject.x, subject.branches, subject.gate, target.workload.spec)
        v.fill_(float("nan"))  # an element that is not written shows
        for step in steps:
            step()
        error = judge.absolute_error(v, subject.exact)
        if not error <= subject.allowed:
            return f"error {error:.2e}, allowed {subject.allowed:.2e}"
        own = target.steps(steps)
        self._calls[choice] = own[0] if len(own) == 1 else lambda: [step() for step in own]
        return ""

    def times(self, choices: Iterable[Choice]) -> Mapping[Choice, float | str]:
        chosen = list(choices)
        contestants = {str(i): protocol.Contestant(self._calls[c]) for i, c in enumerate(chosen)}
        measured = protocol.Measurement()
        protocol.measure(contestants, self.timer, self.budget, measured)
        found: dict[Choice, float | str] = {}
        for i, choice in enumerate(chosen):
            timing = measured.timing(str(i))
            found[choice] = measured.failures[str(i)][1] if timing is None else timing.median_ms / 1e3
        return found

    def trouble(self) -> str:
        if self.device.type != "cuda":
            return ""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
        return ""


class _Subject:
    """A unit with random parameters and input on a device, its result in float64, and the error that is allowed."""

    def __init__(self, workload: Workload, device: torch.device, seed: int) -> None:
        self.workload = workload
        spec = workload.spec
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1
            values = torch.randn(shape, generator=draw) * (2 / fan_in) ** 0.5
            return values.to(device, workload.dtype)

        x = torch.randn(workload.n, spec.in_channels, workload.h_in, workload.w_in, generator=draw)
        self.x = x.to(device, workload.dtype).contiguous(memory_format=torch.channels_last)
        self.branches, self.gate = unit_parameters(spec, random)
        for norm in (*(branch.norm for branch in self.branches), self.gate.norm):
            if isinstance(norm, nn.BatchNorm2d):
                _shake(norm, draw)
        with torch.no_grad(), _arithmetic(workload.allow_tf32):
            branches, gate = _double(self.branches, self.gate)
            parts = [
                reference.sk_conv(part.double(), branches, gate, spec) for part in self.x.split(judge.CHUNK)
            ]
            self.exact = torch.cat(parts)
            eager = reference.sk_conv(self.x, self.branches, self.gate, spec)
        self.allowed = judge.allowed_error(
            judge.absolute_error(eager, self.exact), self.exact, workload.dtype
        )


def _arithmetic(allow_tf32: bool) -> Any:
    """cuDNN's own rounding of fp32 products is part of what eager may err."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32)


@torch.no_grad()
def _shake(norm: nn.BatchNorm2d, draw: torch.Generator) -> None:
    """Statistics and parameters that are no identity."""
    for tensor, low in (
        (norm.weight, 0.5),
        (norm.running_var, 0.5),
        (norm.bias, -0.5),
        (norm.running_mean, -0.5),
    ):
        assert tensor is not None
        tensor.copy_(low + torch.rand(tensor.shape, generator=draw))


def _double(branches: list[Branch], gate: Gate) -> tuple[list[Branch], Gate]:
    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).double()
        return value.double() if isinstance(value, Tensor) else value

    return [Branch(*map(double, branch)) for branch in branches], Gate(*map(double, gate))
