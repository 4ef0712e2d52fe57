"""The report's page of predictions: against the measured times on a GPU that the model knows, else alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import results
from ..formats import microseconds
from ..grid import paper_unit
from ..model import speed_of_light as sol
from ..model import validation
from ..model.choice import choice
from ..model.gpus import chip_for, find_gpu
from ..model.speed_of_light import Problem
from ..model.validation import Compared
from ..shapes import CLASSIC, PAPER, STAGES

PREDICTED = "Predicted for an H100 SXM, batch 128, fp16"
COMPARED = "Predicted against measured"
# The precisions whose configs were compiled for every chip; the model says as much of them as of others.
PAIRS = tuple((unit, dtype) for dtype in ("fp16", "bf16") for unit in (PAPER, CLASSIC))


class UnknownGpuError(Exception):
    """The model does not know the GPU that was measured."""


class NothingToCompareError(Exception):
    """There are no measured times."""


def predictions(gpu: str = "H100 SXM", batch: int = 128) -> str:
    """The table of what is known without a GPU: SKNet-50's stages in fp16, as "auto" runs them.

    Raises:
        ValueError: the GPU is unknown.
    """
    product = find_gpu(gpu)
    problems = [Problem(paper_unit(c), batch, size, size, torch.float16) for c, size in STAGES.values()]
    lines = [
        "| stage | schedule | passes | convolution, instructions per output | memory | tensor cores | "
        "issue slots | **unit** | bound by | eager, by its passes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for problem, predicted in zip(problems, sol.predict_all(problems, product), strict=True):
        by_name = {prediction.schedule: prediction for prediction in predicted}
        chosen = by_name[choice(problem, predicted, chip_for(product))[0]]
        counts = [
            step.work.warp_instructions * product.warp / problem.outputs / problem.spec.num_branches
            for step in chosen.steps
            if step.work.name.startswith(("branch_conv", "unit")) and step.work.warp_instructions is not None
        ]
        times = [f"{microseconds(chosen.seconds(bound))} µs" for bound in (sol.MEMORY, sol.MATRIX, sol.ISSUE)]
        cells = [
            f"{problem.spec.in_channels} @ {problem.height}²",
            chosen.schedule,
            f"{chosen.memory_bytes / problem.tensor_bytes:.2f} T",
            " + ".join(f"{count:.1f}" for count in counts),
            *times,
            f"**{microseconds(chosen.total)} µs**",
            chosen.bound,
            f"{microseconds(by_name[sol.EAGER].total)} µs",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def against_measured(layer: Path, seconds: float) -> str:
    """Every schedule's predicted and measured time in the cases of a file of suite "layer", as text.

    Units and dtypes are compiled one after another; none begins after `seconds`.

    Raises:
        NothingToCompareError: no file, or no measured schedule.
        UnknownGpuError: such a GPU.
    """
    if not layer.exists():
        raise NothingToCompareError("suite layer has not been measured")
    measured = results.read(layer)
    try:
        gpu = find_gpu(measured.stamp.device)
    except ValueError as error:
        raise UnknownGpuError(str(error)) from None
    deadline = time.monotonic() + seconds
    parts = []
    for unit, dtype in PAIRS:
        if time.monotonic() > deadline:
            parts.append(f"{unit}, {dtype}: left out, the time was over")
            continue
        cases = validation.seconds_of(measured, unit, dtype)
        if compared := validation.compare(cases, gpu, dtype):
            parts.append(f"{unit}, {dtype}\n{_table(compared)}")
    if not parts:
        raise NothingToCompareError("no schedule has been measured")
    return "\n\n".join(parts)


def _table(compared: Sequence[Compared]) -> str:
    lines = [f"{'case':<44} {'schedule':<16} {'predicted µs':>12} {'measured µs':>12} {'ratio':>6}"]
    for found in compared:
        predicted, measured = found.predicted * 1e6, found.measured * 1e6
        lines.append(
            f"{found.case:<44} {found.schedule:<16} {predicted:>12.1f} {measured:>12.1f} {measured / predicted:>6.2f}"
        )
    correlation = validation.rank_correlation(list(compared))
    if correlation is not None:
        lines.append(f"rank correlation (Spearman): {correlation:.2f} over {len(compared)} times")
    return "\n".join(lines)
