"""What went wrong in a run, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from . import results
from .results import Record


class Complaint(NamedTuple):
    """What befell one provider in some cases."""

    status: str
    label: str
    message: str
    cases: int

    @property
    def words(self) -> str:
        """Without the status: the provider, the number of cases if more than one, and the message."""
        cases = f" ({self.cases} cases)" if self.cases > 1 else ""
        return f"{self.label}{cases}: {self.message}"


def complaints(records: Iterable[Record]) -> list[Complaint]:
    """Each different complaint once, with the number of cases it stands for; also of what was skipped."""
    counts: dict[tuple[str, str, str], int] = {}
    for record in records:
        if record.status not in (results.OK, results.NOT_MEASURED):
            key = (record.status, record.label, record.message or "")
            counts[key] = counts.get(key, 0) + 1
    return [Complaint(*key, count) for key, count in counts.items()]


def in_one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
