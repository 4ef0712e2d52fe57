"""Tuned entries for tests: one GPU, one unit, its lookups."""

from __future__ import annotations

from dataclasses import replace

import torch

from sk_triton import planning
from sk_triton.bench.grid import paper_unit
from sk_triton.chips import Chip
from sk_triton.kernels.config import StreamConfig
from sk_triton.tuning.entries import Entry, Origin, Trial
from sk_triton.tuning.keys import stamp
from sk_triton.tuning.lookup import experiment
from sk_triton.workload import Workload

H100 = Chip("sm_90", 132, 50, "NVIDIA H100 80GB HBM3")
UNIT = paper_unit(128)


def workload(n: int = 128, chip: Chip = H100, size: int = 56, **settings) -> Workload:
    return Workload(settings.pop("spec", UNIT), n, size, size, torch.float16, chip, **settings)


def origin(chip: Chip = H100, **changes) -> Origin:
    current = stamp()
    return replace(Origin(chip.gpu, chip.processors, chip.name, current.triton, current.kernels), **changes)


def requests(schedule: str, work: Workload) -> dict:
    """The lookups of a schedule by the kind of launch."""
    with experiment() as asked:
        planning.make_plan(schedule, work)
    return {request.kind: request for request in asked}


def other_choice(request):
    """A config of the search space that is not the analytic choice."""
    return next(config for config in request.candidates() if config != request.analytic())


def entry(choice, n: int = 128, analytic: float = 100e-6, tuned: float = 80e-6) -> Entry:
    shown = StreamConfig(8, 8, 4, 4, RUN_H=1, RUN_W=2) if choice is None else choice
    trials = Trial(shown, 50e-6, tuned), Trial(shown, None, None, "3 spills")
    return Entry(choice, n, analytic, tuned, trials)
