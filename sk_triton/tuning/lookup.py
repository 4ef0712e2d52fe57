"""The four levels in which a config is found; see :mod:`sk_triton.tuning`. No lookup ever measures anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..chips import CHIPS, Chip
from . import user_file
from .entries import Choice, Entry, Origin, Sections
from .keys import most_samples, near
from .ranks import pinning_reason, user_sections
from .shipped import contributed, shipped


@dataclass(frozen=True)
class Source:
    """Where the config of a launch of a kind is from, and the key that it was asked for by."""

    kind: str
    text: str
    key: str

    def __str__(self) -> str:
        return self.text


class Found(NamedTuple):
    """A config, or the name of a schedule, and where it is from."""

    config: Any
    source: Source


@dataclass(frozen=True)
class Request:
    """What a launch asks a config by.

    Attributes:
        kind: a name in `keys.KINDS`.
        candidates: gives the search space; analytic: gives the analytic choice.
        n: samples that the launch is for.
        cost: relative predicted time of a candidate, where there is a model of it.
        serves: whether an entry that was measured at so many samples serves this batch as well; the entry's choice is
            None where it is the analytic one.
        is_pinned: as of :class:`sk_triton.workload.Workload`.
    """

    kind: str
    key: str
    candidates: Callable[[], Sequence[Any]]
    analytic: Callable[[], Any]
    n: int
    cost: Callable[[Any], float] | None = None
    serves: Callable[[Choice | None, int], bool] = lambda choice, n: True
    is_pinned: bool = False

    def found(self, config: Any, text: str) -> Found:
        """The answer, from where `text` says."""
        return Found(config, Source(self.kind, text, self.key))


@dataclass
class _Experiment:
    choices: Mapping[str, Choice]
    requests: list[Request] = field(default_factory=list)


_experiment: ContextVar[_Experiment | None] = ContextVar("sk_triton_experiment", default=None)


@contextlib.contextmanager
def experiment(choices: Mapping[str, Choice] = {}) -> Iterator[list[Request]]:
    """Inside, lookups take `choices` by key, and else the analytic choice. Yields the list of their requests.

    For what tries configs out: plan inside with :func:`sk_triton.planning.make_plan`, which remembers nothing.
    """
    session = _Experiment(choices)
    token = _experiment.set(session)
    try:
        yield session.requests
    finally:
        _experiment.reset(token)


def analytic_only() -> contextlib.AbstractContextManager[object]:
    """As :func:`experiment`: inside, lookups take the analytic choice, whatever was tuned or is shipped."""
    return experiment()


def resolve(request: Request, chip: Chip) -> Found:
    """The config of a launch on a chip."""
    session = _experiment.get()
    if session is not None:
        session.requests.append(request)
        choice = session.choices.get(request.key)
        return request.found(request.analytic() if choice is None else choice, "an experiment")
    found = tuned(request, chip)
    if found is not None:
        return found
    config = _predicted(request, chip)
    if config is not None:
        return request.found(config, f"configs/{chip.name}.json (predicted)")
    return request.found(request.analytic(), f"analytic ({chip.name})")


def tuned(request: Request, chip: Chip) -> Found | None:
    """What was tuned for this very GPU, for this batch or one near it; None if nothing was."""
    if not chip.gpu or _experiment.get() is not None:
        return None
    for key in near(request.key):
        entry, is_own = _entry(key, chip, request.is_pinned), key == request.key
        if entry is None:
            continue
        if entry.failure and is_own:
            text = f"analytic ({chip.name}), not tuned on {_title(chip)}: {entry.failure}"
            return request.found(request.analytic(), text)
        if entry.failure or (entry.n != request.n and not request.serves(entry.choice, entry.n)):
            continue
        where = _title(chip) + ("" if entry.n == request.n else f" at a batch of {entry.n}")
        if entry.choice is None:
            confirmed = request.found(request.analytic(), f"analytic ({chip.name}), confirmed on {where}")
            return confirmed if is_own else None
        if not entry.is_tuned and entry.choice == request.analytic():
            return request.found(entry.choice, f"analytic ({chip.name}), confirmed on {where}")
        if entry.choice in request.candidates():
            return request.found(entry.choice, f"tuned for {where}")
        user_file.warn_once(f"a tuned entry is not used: {key} has no candidate {entry.choice}")
    return None


def describe(chip: Chip) -> str:
    """A line on a device and what is tuned for it."""
    if not chip.gpu:
        return chip.name
    reason = pinning_reason()
    own, packaged = _of(user_sections(), chip), _of(contributed(chip.gpu, chip.processors), chip)
    entries = packaged if reason else {**packaged, **own}
    count = sum(entry.is_tuned for entry in entries.values())
    note = f"{count} launches are tuned for it"
    if len(entries) > count:
        note += f", {len(entries) - count} keep the analytic choice"
    if not entries:
        note = f"nothing is tuned for it, the choices for {chip.name} serve"
    if reason and own:
        note += f"; {len(own)} that the user tuned are not used: {reason}"
    return f"{_title(chip)}, {chip.name}: {note}"


def _predicted(request: Request, chip: Chip) -> Any:
    """The package's prediction, which was made for the processors of a typical product and for a power of two of the
    batch, as all of the support grid are; None where either is another."""
    if chip.processors != CHIPS[chip.name].processors or request.n != most_samples(request.key):
        return None
    return shipped(chip.name).get(request.key)


def _entry(key: str, chip: Chip, is_pinned: bool) -> Entry | None:
    """The user's entry before the package's."""
    found = None if is_pinned else _of(user_sections(), chip).get(key)
    return found or _of(contributed(chip.gpu, chip.processors), chip).get(key)


def _of(sections: Sections, chip: Chip) -> Mapping[str, Entry]:
    """The entries of a GPU that are for the installed Triton and these kernels."""
    return sections.get(Origin.of(chip), {})


def _title(chip: Chip) -> str:
    return f"{chip.gpu} ({chip.processors} SMs)"
