"""Units with random parameters and input on a device, their results in float64, and the error that is allowed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sk_triton import reference
from sk_triton.params import Branch, Gate
from sk_triton.plan import Plan
from sk_triton.training.tensors import unit_tensors
from sk_triton.workload import Workload

from ..compiled.planned import prepared_steps, unit_parameters
from ..compiled.training_steps import intercepted, step, training_unit
from ..measuring import judge, protocol
from ..measuring.competition import MIN_CHECK_BATCH
from ..measuring.providers import GATE_SCALE, GATE_SHIFT
from .targets import SAVE


class Subject(Protocol):
    """A unit on its whole batch."""

    def run(self, plan: Plan) -> tuple[Sequence[Any], str]:
        """Runs a plan: its steps, which can be run again, and what is wrong with the result, "" if nothing."""


class InferenceSubject:
    """A unit without gradients, judged by the largest error of its output."""

    def __init__(self, workload: Workload, device: torch.device, seed: int) -> None:
        self.spec = spec = workload.spec
        random = _random(workload, device, seed)
        self.x = _channels_last(random(workload.n, spec.in_channels, workload.h_in, workload.w_in))
        self.branches, self.gate = unit_parameters(spec, _scaled(random))
        _shake(self.branches, self.gate, seed)
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

    def run(self, plan: Plan) -> tuple[Sequence[Any], str]:
        steps, v = prepared_steps(plan, self.x, self.branches, self.gate, self.spec)
        v.fill_(float("nan"))  # an element that is not written shows
        for planned in steps:
            planned()
        return steps, _fault("", judge.absolute_error(v, self.exact), self.allowed)


class TrainingSubject:
    """A unit in a training step, judged by its output and by the gradients of its input and its branches.

    Float64 takes many times the memory: where the whole batch does not fit, half of it is judged, or half of that.
    """

    def __init__(self, workload: Workload, device: torch.device, seed: int) -> None:
        spec, self.dtype = workload.spec, workload.dtype
        random = _random(workload, device, seed)
        branches, gate = unit_parameters(spec, _scaled(random))
        _shake(branches, gate, seed)
        _steady(gate, seed)
        self.x = _channels_last(random(workload.n, spec.in_channels, workload.h_in, workload.w_in))
        self.dv = _channels_last(random(workload.n, spec.out_channels, *workload.output_size))
        self.unit = training_unit(spec, branches, gate)
        with _arithmetic(workload.allow_tf32):
            self.judged, self.exact, eager = self._expected(branches, gate)
        share = 0.0
        if spec.branch_act != "identity" or spec.gate_act != "identity":
            share = judge.flips(self.x[: self.judged].numel(), self.dtype)
        self.allowed = {
            name: judge.allowed_error(
                judge.absolute_error(eager[name], exact, _NORMS[name]),
                exact,
                self.dtype,
                _NORMS[name],
                0.0 if name == "v" else share,
            )
            for name, exact in self.exact.items()
        }

    def run(self, plan: Plan) -> tuple[Sequence[Any], str]:
        launched: list[Any] = []

        def start(launch: Any, run: Callable[[], object]) -> None:
            launched.append(launch)
            run()

        with intercepted(start):
            found = self._step(plan, len(self.x))
        if self.judged < len(self.x):
            found = self._step(plan, self.judged)
        for name, exact in self.exact.items():
            error = judge.absolute_error(found[name], exact, _NORMS[name])
            if fault := _fault(f"{name}: ", error, self.allowed[name]):
                return launched, fault
        return launched, ""

    def _step(self, plan: Plan, samples: int) -> dict[str, Tensor]:
        v, gradients = step(self.unit, plan, SAVE, self.x[:samples], self.dv[:samples])
        return _named(v, gradients)

    def _expected(
        self, branches: list[Branch], gate: Gate
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """How many samples are judged, what float64 gives for them, and what eager does."""
        samples = len(self.x)
        while True:
            x, dv = self.x[:samples], self.dv[:samples]
            try:
                exact = _through_autograd(x.double(), *_double(branches, gate), self.unit.spec, dv.double())
                return samples, exact, _through_autograd(x, branches, gate, self.unit.spec, dv)
            except (RuntimeError, MemoryError) as error:
                if not protocol.is_out_of_memory(error) or samples <= MIN_CHECK_BATCH:
                    raise
            samples //= 2


_NORMS = {"v": judge.LARGEST, "dx": judge.RMS, "weights": judge.RMS, "norms": judge.RMS}


def _named(v: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """The output, the gradient of the input, and those of the branches' weights and vectors, joined."""
    return {
        "v": v,
        "dx": gradients[0],
        "weights": torch.cat([g.flatten() for g in gradients[1:] if g.dim() == 4]),
        "norms": torch.cat([g.flatten() for g in gradients[1:] if g.dim() == 1]),
    }


def _through_autograd(
    x: Tensor, branches: list[Branch], gate: Gate, spec: Any, dv: Tensor
) -> dict[str, Tensor]:
    tensors = [tensor for tensor in unit_tensors(branches, gate).flat() if tensor is not None]
    leaves = [x, *tensors]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        v = reference.sk_conv(x, branches, gate, spec)
        gradients = torch.autograd.grad(v, leaves, dv)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return _named(v.detach(), gradients)


def _fault(name: str, error: float, allowed: float) -> str:
    return "" if error <= allowed else f"{name}error {error:.2e}, allowed {allowed:.2e}"


def _random(workload: Workload, device: torch.device, seed: int) -> Callable[..., Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=draw).to(device, workload.dtype)


def _scaled(random: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Weights that keep the size of what passes through them."""

    def scaled(*shape: int) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1
        return random(*shape) * (2 / fan_in) ** 0.5

    return scaled


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _arithmetic(allow_tf32: bool) -> Any:
    """cuDNN's own rounding of fp32 products is part of what eager may err."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32)


@torch.no_grad()
def _shake(branches: list[Branch], gate: Gate, seed: int) -> None:
    """Statistics and parameters of norms that are no identity."""
    draw = torch.Generator().manual_seed(seed)
    for norm in (*(branch.norm for branch in branches), gate.norm):
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low in (
                (norm.weight, 0.5),
                (norm.running_var, 0.5),
                (norm.bias, -0.5),
                (norm.running_mean, -0.5),
            ):
                assert tensor is not None
                tensor.copy_(low + torch.rand(tensor.shape, generator=draw))


@torch.no_grad()
def _steady(gate: Gate, seed: int) -> None:
    """Keeps the gate's values clear of their ReLU's threshold, as in the suites: see `providers.GATE_SCALE`."""
    if isinstance(gate.norm, nn.BatchNorm2d):
        draw = torch.Generator().manual_seed(seed)
        gate.norm.weight.mul_(GATE_SCALE)
        gate.norm.bias.copy_(GATE_SHIFT * (torch.randint(2, gate.norm.bias.shape, generator=draw) * 2.0 - 1))


def _double(branches: list[Branch], gate: Gate) -> tuple[list[Branch], Gate]:
    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).double()
        return value.double() if isinstance(value, Tensor) else value

    return [Branch(*map(double, branch)) for branch in branches], Gate(*map(double, gate))
