"""A run of `sk-triton tune` on this machine's GPU: what it tunes for, what it keeps, how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sk_triton.chips import CHIPS, Chip, chip_of
from sk_triton.tuning import user_file
from sk_triton.tuning.entries import Entry, Origin, Trial
from sk_triton.tuning.keys import stamp

from ..model.gpus import GPUS, Gpu, chip_for, find_gpu
from ..progress import case_progress
from .assessing import Assessor
from .flow import DeviceLostError, Outcome, tune
from .targets import Settled, Target

if TYPE_CHECKING:
    from rich.console import Console

BUDGET_SECONDS = 300.0


def product(name: str) -> tuple[Chip, Gpu]:
    """A product's chip and figures. Raises ValueError for an unknown name."""
    gpu = find_gpu(name)
    return chip_for(gpu), gpu


def present(device: torch.device) -> tuple[Chip, Gpu]:
    """The device's chip, and the figures of its product; of a relative where the product is not in the table.

    Raises:
        ValueError: the chip is not supported.
    """
    chip = chip_of(device)
    if chip is None:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} is not supported; supported are {', '.join(CHIPS)}"
        )
    try:
        return chip, find_gpu(chip.gpu)
    except ValueError:
        relative = next(gpu for gpu in GPUS if gpu.chip == chip.name)
        return chip, replace(relative, processors=chip.processors)


@dataclass(frozen=True)
class TuneRequest:
    """Where and how long to tune. `gpu`: the figures that predictions take."""

    device: torch.device
    chip: Chip
    gpu: Gpu
    seconds: float = BUDGET_SECONDS
    again: bool = False
    workers: int = 2

    @property
    def origin(self) -> Origin:
        """What the entries are kept under."""
        current = stamp()
        return Origin(self.chip.gpu, self.chip.processors, self.chip.name, current.triton, current.kernels)


UNKEPT = "not everything that was tuned could be kept, see the warning"
INTERRUPT = "interrupted; what was tuned is kept, the next run goes on"


def tune_here(targets: list[Target], request: TuneRequest, console: Console) -> tuple[list[Outcome], str]:
    """What became of each target, and why it ended early, or "". Entries are kept as they come."""
    from .machine import Device

    earlier = {} if request.again else user_file.read().get(request.origin, {})
    outcomes: list[Outcome] = []

    unkept: list[Target] = []

    def keep(target: Target, entry: Entry) -> None:
        if not user_file.save(request.origin, {target.key: entry}):
            unkept.append(target)

    try:
        with (
            _assessing(targets, earlier, request) as assessed,
            case_progress(console, len(targets)) as report,
        ):
            for outcome in tune(
                targets,
                Device(request.device),
                assessed,
                earlier.get,
                keep,
                request.seconds,
                lambda target: report(len(outcomes), f"{target.unit}: {target.kind}", 0.0),
            ):
                outcomes.append(outcome)
    except KeyboardInterrupt:
        return outcomes, INTERRUPT
    except DeviceLostError as error:
        return outcomes, f"the GPU failed, which ends this run; the next one goes on: {error}"
    return outcomes, UNKEPT if unkept else ""


@contextmanager
def _assessing(
    targets: list[Target], earlier: dict[str, Entry], request: TuneRequest
) -> Iterator[Callable[[Target, Settled], list[Trial]]]:
    """Compiles ahead in other processes while this one measures."""
    assessor = Assessor(request.gpu, request.workers)
    for target in targets:
        if not target.is_schedule and not (target.key in earlier and target.takes(earlier[target.key])):
            for choice in target.choices:
                assessor.begin(target, choice, {})

    def assessed(target: Target, settled: Settled) -> list[Trial]:
        for choice in target.choices:
            assessor.begin(target, choice, dict(settled))
        return [assessor.trial(target, choice, settled) for choice in target.choices]

    try:
        yield assessed
    finally:
        assessor.close()
