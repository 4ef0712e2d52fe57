"""Who competes: a provider is one source in one form."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import results
from ..shapes import CLASSIC, PAPER, SKNET50, TRAINING, Case, network_shape
from . import forms
from .forms import Form
from .inputs import KINDS, make_input
from .sources import (
    ClassicClass,
    Ours,
    PlainClassic,
    PlainPaper,
    Source,
    Timm,
    forced_schedules,
    saving_input,
    yardstick,
)

State = dict[str, Tensor]

WEIGHT_SEED = 2
"""Added to a run's seed, so that weights are another stream of numbers than the input."""
CALIBRATION_BATCH = 8
CALIBRATION_SIZE = 64
RESIDUAL_SCALE = 0.2
"""Of a block's last norm: a random network whose blocks add as much as they pass on amplifies every rounding."""

GATE_SHIFT = 1.5
GATE_SCALE = 0.25
"""Of the gate's norm in training: its few values stay clear of their ReLU's threshold, half of them on either side. A
value that a rounding takes across it changes all gradients by up to half their size, and no error rule can tell that
from a mistake."""

PEERS: dict[str, tuple[Source, ...]] = {
    CLASSIC: (ClassicClass(), PlainClassic()),
    PAPER: (Timm(), PlainPaper()),
    SKNET50: (PlainPaper(),),
}


@dataclass(frozen=True)
class Provider:
    """One source in one form."""

    source: Source
    form: Form

    @property
    def key(self) -> str:
        return f"{self.source.key}/{self.form.key}"

    def module(self, case: Case, state: State, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The case's module with the weights `state`, in this provider's memory format, in evaluation mode."""
        module = self.source.module(case)
        module.load_state_dict(state)
        module.to(device=device, dtype=dtype, memory_format=self.form.memory_format)  # type: ignore[call-overload]
        return module.eval()

    def record(self, case: Case) -> results.Record:
        """Of this provider in a case, with nothing measured yet."""
        source, form = self.source, self.form
        return results.Record(case, source.key, source.label, form.key, form.label, source.role)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What holds around a measurement, entered outside of the timed call."""
        with self.form.scope(), self.source.scope():
            yield


def competitors(
    case: Case,
    device_type: str,
    quick: bool,
    revisions: Sequence[Source] = (),
    every_form: bool = False,
    is_nvidia: bool | None = None,
) -> list[Provider]:
    """Everyone who competes in a case on a device type ("cpu" or "cuda").

    Args:
        quick: the same peers in fewer forms, those that compile least; `coverage` names the others.
        revisions: sk_triton at other revisions.
        every_form: compiled peers on the CPU too, and "max-autotune" everywhere; minutes for each shape.
    """
    if is_nvidia is None:
        is_nvidia = not torch.version.hip
    peers = PEERS.get(case.subject, (Timm(),))
    ours: list[Source] = [Ours(), *revisions]
    if device_type == "cpu":
        peer_forms = (*forms.EAGER, *forms.COMPILED, *forms.MAX_AUTOTUNED) if every_form else forms.EAGER
        return _pairs(peers, peer_forms) + _pairs(ours, forms.EAGER)
    our_forms = [*forms.EAGER, *forms.GRAPHS]
    if case.is_network and not quick:
        our_forms += (forms.COMPILED[1], forms.COMPILED_GRAPHS[1])  # around our units there is much to fuse
    chosen = _pairs(peers, _gpu_forms(case, quick, every_form)) + _pairs(ours, our_forms)
    if case.direction != TRAINING and case.axis is None and not quick and is_nvidia:
        chosen += _pairs(peers, forms.HEURISTIC)
    if case.direction == TRAINING:
        chosen += _pairs((saving_input(),), (forms.CHANNELS_LAST,))
    elif not case.is_network and not quick:
        chosen += _pairs(forced_schedules(), (forms.CHANNELS_LAST,))
    return chosen


def _pairs(sources: Sequence[Source], wanted: Sequence[Form]) -> list[Provider]:
    return [Provider(source, form) for source in sources for form in wanted]


def _gpu_forms(case: Case, quick: bool, every_form: bool) -> Sequence[Form]:
    """A peer's forms. The fastest must be among them; compiling takes seconds for a unit, minutes for a network."""
    if every_form:
        return tuple(forms.EVERY.values())
    if quick:
        # One compilation of each peer: in a graph, where compiled code is fastest.
        return (*forms.EAGER, *forms.GRAPHS, forms.COMPILED_GRAPHS[1])
    if case.axis is not None or case.is_network:
        return (*forms.EAGER, *forms.COMPILED, *forms.GRAPHS, forms.COMPILED_GRAPHS[1])
    return (*forms.EAGER, *forms.COMPILED, *forms.GRAPHS, *forms.COMPILED_GRAPHS)


def make_state(case: Case, seed: int) -> State:
    """fp32 weights and batch-norm statistics that every provider of a case loads.

    None of them is at its initial value: a provider that drops a bias, swaps the branches or ignores a
    running statistic gives a wrong result. A network's statistics are those of random images.
    """
    generator = torch.Generator().manual_seed(seed + WEIGHT_SEED)
    state: State = {}
    module = yardstick(case.subject).module(case)
    norms = {name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)}
    for name, value in module.state_dict().items():
        draw = functools.partial(torch.rand, value.shape, generator=generator)
        owner, _, kind = name.rpartition(".")
        if not value.is_floating_point():
            state[name] = value
        elif value.dim() > 1:
            fan_in = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif owner in norms and kind in ("weight", "running_var"):
            state[name] = 0.5 + draw()
        else:
            state[name] = draw() - 0.5
    if case.direction == TRAINING:
        for owner in norms:
            if owner.endswith("attn.bn"):
                sign = torch.randint(2, state[f"{owner}.bias"].shape, generator=generator) * 2.0 - 1
                state[f"{owner}.bias"] = GATE_SHIFT * sign
                state[f"{owner}.weight"] = GATE_SCALE * state[f"{owner}.weight"]
    if case.is_network:
        for owner in norms:
            if owner.endswith(("bn3", "conv3.bn")):
                state[f"{owner}.weight"] *= RESIDUAL_SCALE
        module.load_state_dict(state)
        _calibrate(module, seed)
        state = module.state_dict()
    return state


@torch.no_grad()
def _calibrate(network: nn.Module, seed: int) -> None:
    """Batch-norm statistics from data, as training leaves them: drawn at random they make a deep network explode."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the average of what it sees
    network.train()
    shape, cpu = network_shape(CALIBRATION_SIZE), torch.device("cpu")
    images = [make_input(kind, CALIBRATION_BATCH, shape, torch.float32, cpu, seed) for kind in KINDS]
    network(torch.cat(images))
