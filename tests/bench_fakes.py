"""Small cases, settings and providers for tests of the benchmark."""

from __future__ import annotations

import torch
from torch import nn

from sk_triton.bench import results
from sk_triton.bench.measuring import competition, forms, protocol
from sk_triton.bench.measuring.providers import Provider
from sk_triton.bench.measuring.sources import PlainPaper
from sk_triton.bench.shapes import INFERENCE, PAPER, Case, unit_shape

CPU = torch.device("cpu")
SHORT = protocol.Budget(warmup_seconds=0, seconds=0, min_rounds=3, max_rounds=3)


class FakeTimer:
    """A clock that only a call moves: `machine_slowness` multiplies the cost of work at a given time."""

    def __init__(self, machine_slowness=lambda seconds: 1.0):
        self.seconds = 0.0
        self.machine_slowness = machine_slowness

    def work(self, ms: float) -> None:
        self.seconds += ms / 1e3 * self.machine_slowness(self.seconds)

    def now(self) -> float:
        return self.seconds

    def sample(self, call) -> dict[str, float]:
        start = self.seconds
        call()
        return {protocol.COLD: (self.seconds - start) * 1e3}


class FakeSource(PlainPaper):
    """The plain paper's unit under another name."""

    def __init__(self, key="fake"):
        self.key = self.label = key


class Wrapped(FakeSource):
    """A unit whose output goes through `change`."""

    def __init__(self, change, key="wrong"):
        super().__init__(key)
        self.change = change

    def module(self, case):
        module = super().module(case)
        forward = module.forward
        module.forward = lambda x: self.change(forward(x))
        return module


class SwappedBranches(FakeSource):
    def module(self, case):
        module = super().module(case)
        forward, paths = module.forward, module.paths

        def swapped(x):
            module.paths = nn.ModuleList(reversed(list(paths)))
            try:
                return forward(x)
            finally:
                module.paths = paths

        module.forward = swapped
        return module


class Raising(FakeSource):
    """Raises `error` on its call number `on_call`."""

    def __init__(self, error, on_call, key="raising"):
        super().__init__(key)
        self.error, self.on_call, self.calls = error, on_call, 0

    def module(self, case):
        module = super().module(case)
        forward = module.forward

        def call(x):
            self.calls += 1
            if self.calls == self.on_call:
                raise self.error
            return forward(x)

        module.forward = call
        return module


class BreaksWhenBuilt(FakeSource):
    def module(self, case):
        raise TypeError("no such argument")


def small_case(unit=PAPER, batch=2, dtype="fp32", direction=INFERENCE, suite="layer", **axis) -> Case:
    return Case(suite, unit, unit_shape(unit, 32, 7), batch, dtype, direction, **axis)


def setting(*sources, providers=None, seed=0, **options) -> competition.Setting:
    chosen = providers or [Provider(source, forms.NCHW) for source in sources]
    return competition.Setting(CPU, seed, lambda case: chosen, protocol.CpuTimer(), SHORT, **options)


def run_small(*sources, providers=None, **options) -> dict[str, results.Record]:
    """Records by source key of a small case; the floor's under "copy"."""
    records: list[results.Record] = []
    competition.run_case(small_case(**options), setting(*sources, providers=providers), records)
    return {record.source: record for record in records}
