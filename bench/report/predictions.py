"""The report's page of predictions: against the measured times on a GPU that the model knows, else alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .. import explain, results
from ..model import validation
from ..model.gpus import find_gpu
from ..model.validation import Compared
from ..shapes import CLASSIC, PAPER

PREDICTED = "Predicted for an H100 SXM, batch 128, fp16"
COMPARED = "Predicted against measured"
# The precisions whose configs were compiled for every chip; the model says as much of them as of others.
PAIRS = tuple((unit, dtype) for dtype in ("fp16", "bf16") for unit in (PAPER, CLASSIC))


class NothingToCompareError(Exception):
    """There are no measured times, or the model does not know the GPU; the message says which."""


def predictions() -> str:
    """The table of SKNet-50's stages on a GPU that is not here."""
    return explain.predicted_markdown()


def against_measured(layer: Path, seconds: float) -> str:
    """Every schedule's predicted and measured time in the cases of a file of suite "layer", as text.

    Units and dtypes are compiled one after another; none begins after `seconds`.

    Raises:
        NothingToCompareError: no file, no measured schedule, or an unknown GPU.
    """
    if not layer.exists():
        raise NothingToCompareError("suite layer has not been measured")
    measured = results.read(layer)
    try:
        gpu = find_gpu(measured.stamp.device)
    except ValueError as error:
        raise NothingToCompareError(str(error)) from None
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
