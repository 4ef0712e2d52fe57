"""`report.json`: which steps of a report ran, when and under which stamp, and what belongs to no suite."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import json_file
from ..results import Ceilings, Tests
from ..stamp import Stamp
from ..text_file import write_text

SCHEMA = 1
NAME = "report.json"

DONE = "done"
PARTIAL = "partial"
FAILED = "failed"
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class StepState:
    """How a step's last run ended. `date` is UTC, ISO 8601; `message` says what a reader should know."""

    status: str
    date: str
    seconds: float
    stamp: Stamp
    message: str | None = None


@dataclass
class Report:
    """Everything but the suites' results, filled step by step.

    environment: `sk-triton doctor`'s lines. evidence: what subcommands printed, by title.
    """

    seed: int = 0
    steps: dict[str, StepState] = field(default_factory=dict)
    environment: list[str] = field(default_factory=list)
    tests: Tests | None = None
    ceilings: Ceilings | None = None
    evidence: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def is_done(self, step: str, stamp: Stamp) -> bool:
        """Whether a step got to its end under a stamp like this one."""
        state = self.steps.get(step)
        return state is not None and state.status == DONE and state.stamp.measures_like(stamp)

    @property
    def stamp(self) -> Stamp | None:
        """Of the step that ran last."""
        states = sorted(self.steps.values(), key=lambda state: state.date)
        return states[-1].stamp if states else None


def load(folder: Path) -> Report | None:
    """The report in a folder, or None where there is none.

    Raises:
        ValueError: the file is no report of this schema version.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return _report(json_file.fields_of(path.read_text(encoding="utf-8"), SCHEMA, "report"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of schema {SCHEMA}: {error!r}") from None


def save(report: Report, folder: Path) -> None:
    """Writes the report in one atomic step."""
    write_text(json_file.text_of(report), folder / NAME)


def _report(data: dict[str, Any]) -> Report:
    steps = {
        name: StepState(**{**state, "stamp": Stamp(**state["stamp"])})
        for name, state in data["steps"].items()
    }
    return Report(
        seed=data["seed"],
        steps=steps,
        environment=data["environment"],
        tests=Tests(**data["tests"]) if data["tests"] else None,
        ceilings=Ceilings(**data["ceilings"]) if data["ceilings"] else None,
        evidence=data["evidence"],
    )
