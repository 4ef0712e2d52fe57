"""Who competes: a `Source` says whose module runs, a `Form` how it is run; a provider is one of each.

Adding a peer is one small `Source` class, adding a way to run it one small `Form` class, and a line in
`providers`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sk_triton.backend import Backend, use_backend
from sk_triton.environment import MissingPackageError, require

from .peers import PaperUnit, SeedSKConv
from .shapes import BRANCHES, GROUPS, MIN_GATE_WIDTH, REDUCTION, Stage

TIMM_SETTINGS: dict[str, Any] = {
    "groups": GROUPS,
    "split_input": False,
    "rd_ratio": 1 / REDUCTION,
    "rd_divisor": MIN_GATE_WIDTH,
}
"""The paper's unit by timm's names: at every stage of SKNet-50 its gate width is `max(C / r, L)`."""

Forward = Callable[[Tensor], Tensor]
State = dict[str, Tensor]


class Source(ABC):
    """Whose module it is. `ours` marks what sk_triton runs by default on the device at hand."""

    key: str
    label: str
    ours: bool = False

    def missing(self) -> str | None:
        """Why this source cannot run here, with the line that mends it; None if it can."""
        return None

    @abstractmethod
    def module(self, stage: Stage) -> nn.Module:
        """The unit at one stage's size."""

    def bind(self, forward: Forward) -> Forward:
        """`forward` as this source's users call it."""
        return forward


class SeedClass(Source):
    """The seed document's class."""

    key = "seed"
    label = "seed document's SKConv"

    def module(self, stage: Stage) -> nn.Module:
        return SeedSKConv(stage.channels, M=BRANCHES, G=GROUPS, r=REDUCTION, L=MIN_GATE_WIDTH)


class PlainPaperUnit(Source):
    """The paper's unit in plain PyTorch."""

    key = "paper"
    label = "paper's unit, plain PyTorch"

    def module(self, stage: Stage) -> nn.Module:
        return PaperUnit(stage.channels, M=BRANCHES, G=GROUPS, r=REDUCTION, L=MIN_GATE_WIDTH)


class TimmSelectiveKernel(Source):
    """timm's `SelectiveKernel` with skresnext50_32x4d's settings."""

    key = "timm"
    label = "timm's SelectiveKernel"

    def missing(self) -> str | None:
        return _missing("timm")

    def module(self, stage: Stage) -> nn.Module:
        from timm.layers import SelectiveKernel

        return SelectiveKernel(stage.channels, **TIMM_SETTINGS)


class Ours(Source):
    """sk_triton's layer on one explicit backend."""

    def __init__(self, unit: str, backend: Backend, device_type: str) -> None:
        self.unit = unit
        self.backend = backend
        self.key = f"ours-{backend}"
        self.ours = backend == "triton" or device_type == "cpu"
        if backend == "triton":
            self.label = "sk_triton (Triton)"
        elif device_type == "cpu":
            self.label = "sk_triton (CPU reference path)"
        else:
            self.label = "sk_triton (eager reference)"

    def missing(self) -> str | None:
        return _missing("triton") if self.backend == "triton" else None

    def module(self, stage: Stage) -> nn.Module:
        import sk_triton

        if self.unit == SEED:
            return sk_triton.SKConv(stage.channels, M=BRANCHES, G=GROUPS, r=REDUCTION, L=MIN_GATE_WIDTH)
        return sk_triton.SelectiveKernel(stage.channels, **TIMM_SETTINGS)

    def bind(self, forward: Forward) -> Forward:
        def call(x: Tensor) -> Tensor:
            with use_backend(self.backend):
                return forward(x)

        return call


class Form(ABC):
    """How a module is run: memory format and compilation."""

    key: ClassVar[str]
    label: ClassVar[str]
    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format

    def prepare(self, module: nn.Module) -> Forward:
        """`module`, ready to be called."""
        return module


class Eager(Form):
    key = "nchw"
    label = "NCHW"


class EagerChannelsLast(Eager):
    key = "channels_last"
    label = "channels_last"
    memory_format = torch.channels_last


class Compiled(Form):
    key = "compile-nchw"
    label = "torch.compile, NCHW"

    def prepare(self, module: nn.Module) -> Forward:
        return torch.compile(module, dynamic=False)


class CompiledChannelsLast(Compiled):
    key = "compile-channels_last"
    label = "torch.compile, channels_last"
    memory_format = torch.channels_last


@dataclass(frozen=True)
class Provider:
    """One source in one form."""

    source: Source
    form: Form

    @property
    def key(self) -> str:
        return f"{self.source.key}/{self.form.key}"

    def build(self, stage: Stage, state: State, dtype: torch.dtype, device: torch.device) -> Forward:
        """The unit in evaluation mode with the weights `state`, as a function of the input."""
        module = self.source.module(stage)
        module.load_state_dict(state)
        module.to(device=device, dtype=dtype, memory_format=self.form.memory_format)  # type: ignore[call-overload]
        return self.source.bind(self.form.prepare(module.eval()))

    def arrange(self, x: Tensor) -> Tensor:
        """The input in this provider's memory format."""
        return x.contiguous(memory_format=self.form.memory_format)


SEED = "seed"
PAPER = "paper"


@dataclass(frozen=True)
class Unit:
    """A function that providers compete on. `yardstick` is the eager peer that defines the allowed error."""

    key: str
    title: str
    yardstick: Source


UNITS = {
    SEED: Unit(SEED, "Seed document's unit: 3x3 and 5x5 with bias, no norm", SeedClass()),
    PAPER: Unit(PAPER, "Paper's and timm's unit: 3x3 and dilated 3x3, batch norm, ReLU", PlainPaperUnit()),
}


def providers(unit: str, device_type: str, quick: bool) -> list[Provider]:
    """Everyone who competes on `unit` ("seed" or "paper") on a device type ("cpu" or "cuda")."""
    on_gpu = device_type == "cuda"
    peers: list[Source] = [SeedClass()] if unit == SEED else [TimmSelectiveKernel()]
    if unit == PAPER and not quick:
        peers.append(PlainPaperUnit())
    eager: list[Form] = [Eager(), EagerChannelsLast()]
    compiled: list[Form] = []
    if on_gpu:
        compiled = [CompiledChannelsLast()] if quick else [Compiled(), CompiledChannelsLast()]
    ours = Ours(unit, "triton" if on_gpu else "reference", device_type)
    chosen = [Provider(source, form) for source in peers for form in eager + compiled]
    if on_gpu and not quick:
        chosen += [Provider(Ours(unit, "reference", device_type), form) for form in eager]
    return chosen + [Provider(ours, form) for form in eager]


def make_state(unit: Unit, stage: Stage, seed: int) -> State:
    """fp32 weights and batch-norm statistics that every provider of a case loads.

    None of them is at its initial value: a provider that drops a bias, swaps the branches or ignores a
    running statistic gives a wrong result.
    """
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, value in unit.yardstick.module(stage).state_dict().items():
        draw = functools.partial(torch.rand, value.shape, generator=generator)
        if not value.is_floating_point():
            state[name] = value
        elif value.dim() > 1:
            fan_in = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.5 + draw()
        else:
            state[name] = draw() - 0.5
    return state


def _missing(module: str) -> str | None:
    try:
        require(module)
    except MissingPackageError as error:
        return str(error)
    return None
