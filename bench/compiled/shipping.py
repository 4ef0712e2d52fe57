"""Ships the analytic configs of what was compiled: writes them into their chips' files."""

from __future__ import annotations

import json

from sk_triton.environment import installed_triton
from sk_triton.tuning import shipped
from sk_triton.tuning.launches import branch_key
from sk_triton.tuning.lookup import analytic_only

from ..grid import GridCase
from .resources import Row, measure, workload_of


def measure_analytic(case: GridCase, target: str) -> list[Row]:
    """`resources.measure` with the analytic configs, not with what is shipped today; for a process that does nothing
    else, since its plans are remembered."""
    with analytic_only():
        return measure(case, target)


def write_configs(rows: list[Row]) -> None:
    """Put the configs of the branch launches in `rows` that have no fault into their chips' shipped files.

    Entries for other launches stay if they were made for the kernels as they are.

    Raises:
        ValueError: a batch that no lookup asks for.
    """
    by_chip = {row.resources.target: dict(shipped.shipped(row.resources.target)) for row in rows}
    for row in rows:
        if row.branch_launch is not None and not row.faults:
            case, launch = row.case, row.branch_launch
            if case.n & (case.n - 1):  # see `lookup`: what is shipped is looked up for these alone
                raise ValueError(f"a batch that is shipped for must be a power of two, got {case.n}")
            key = branch_key(workload_of(case, row.resources.target), launch.shape, launch.task)
            by_chip[row.resources.target][key] = launch.config
    for chip, entries in by_chip.items():
        content = json.dumps(shipped.shipped_content(chip, entries, installed_triton() or "none"), indent=1)
        shipped.shipped_file(chip).write_text(content + "\n")
