"""Tuned entries and the JSON they are kept in: read as if it came from a stranger, since it may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..chips import Chip
from ..kernels.config import CONFIGS, Config
from .keys import SCHEDULE, kind_of_key, most_samples, stamp

SCHEMA = 1
MAX_BYTES = 16 << 20
MAX_TEXT = 200
MAX_FIELD = 1 << 16
"""The largest number in a config; no kernel comes near it."""
MAX_MICROSECONDS = 1e12
"""Eleven days."""

Choice = Config | str
"""A config, or the name of a schedule."""

_ENTRY_FIELDS = ("choice", "n", "failure", "analytic_us", "tuned_us", "trials")


class BrokenFileError(ValueError):
    """The text is no file of tuned entries."""


class NewerFileError(BrokenFileError):
    """A newer version of this package wrote the file."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried: its predicted and measured time in seconds, or why it was dropped."""

    choice: Choice
    predicted: float | None
    measured: float | None
    dropped: str = ""


@dataclass(frozen=True)
class Entry:
    """What tuning a launch found.

    Attributes:
        choice: the fastest, or None where nothing beat the analytic config; of a schedule always its name, since which
            one is expected may change from one version to the next.
        n: samples that it was measured at.
        analytic_seconds, tuned_seconds: times of the analytic choice and of what is used.
        trials: all candidates.
        failure: why nothing could be measured, "" where it was: then there is no choice, and times are 0.
    """

    choice: Choice | None
    n: int
    analytic_seconds: float
    tuned_seconds: float
    trials: tuple[Trial, ...] = ()
    failure: str = ""

    @property
    def is_tuned(self) -> bool:
        """Whether something was faster than the analytic choice."""
        return self.choice is not None and self.tuned_seconds < self.analytic_seconds


@dataclass(frozen=True)
class Origin:
    """The GPU and the code that entries were measured with: `gpu` as its driver names it, `processors` its SMs."""

    gpu: str
    processors: int
    chip: str
    triton: str
    kernels: str

    @classmethod
    def of(cls, chip: Chip) -> Origin:
        """Of what is measured now, on a chip."""
        return cls(chip.gpu, chip.processors, chip.name, stamp().triton, stamp().kernels)

    @property
    def is_current(self) -> bool:
        """Whether the installed Triton and these kernels are those that the entries were measured with."""
        return (self.triton, self.kernels) == (stamp().triton, stamp().kernels)


Entries = dict[str, Entry]
"""By key."""
Sections = dict[Origin, Entries]


def dump_config(config: Config) -> dict[str, Any]:
    """A config as a JSON object."""
    kernel = next(name for name, cls in CONFIGS.items() if type(config) is cls)
    return {"kernel": kernel, **asdict(config)}


def load_config(raw: Any) -> Config:
    """The config that a JSON object describes; whether a launch can run it is for the search space to say.

    Raises:
        ValueError: not an object, an unknown kernel, a field missing, unknown, of another type or out of range.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"a config must be an object, got a {type(raw).__name__}")
    values = dict(raw)
    name = values.pop("kernel", None)
    cls = CONFIGS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"kernel must be one of {', '.join(CONFIGS)}, got {_shown(name)}")
    known = {field.name: field for field in fields(cls)}
    if set(values) != set(known):
        raise ValueError(
            f"a config of {name} must have the fields {', '.join(known)}, got {_shown(sorted(values))}"
        )
    for field, value in values.items():
        # Annotations are types or, in files that postpone them, their names.
        expected = bool if known[field].type in (bool, "bool") else int
        if type(value) is not expected:
            raise ValueError(f"{field} must be {expected.__name__}, got {_shown(value)}")
        if expected is int and not 1 <= value <= MAX_FIELD:
            raise ValueError(f"{field} must be between 1 and {MAX_FIELD}, got {_shown(value)}")
    return cls(**values)


def dump_entry(entry: Entry) -> dict[str, Any]:
    """An entry as a JSON object, times in microseconds."""
    return {
        "choice": None if entry.choice is None else _dump_choice(entry.choice),
        "n": entry.n,
        "failure": _printable(entry.failure),
        "analytic_us": _microseconds(entry.analytic_seconds),
        "tuned_us": _microseconds(entry.tuned_seconds),
        "trials": [
            {
                "choice": _dump_choice(trial.choice),
                "predicted_us": _microseconds(trial.predicted),
                "measured_us": _microseconds(trial.measured),
                "dropped": _printable(trial.dropped),
            }
            for trial in entry.trials
        ],
    }


def load_entry(key: str, raw: Any) -> Entry:
    """The entry of a launch.

    Raises:
        ValueError: what `key` names, or the entry, is not what :func:`dump_entry` writes.
    """
    kind = kind_of_key(key)
    if not isinstance(raw, dict) or set(raw) != set(_ENTRY_FIELDS):
        raise ValueError(f"an entry must be an object of {', '.join(_ENTRY_FIELDS)}")
    trials = raw["trials"]
    if not isinstance(trials, list):
        raise ValueError(f"trials must be a list, got {_shown(trials)}")
    is_schedule = kind.name == SCHEDULE
    entry = Entry(
        None if raw["choice"] is None else _load_choice(raw["choice"], is_schedule),
        _load_samples(raw["n"], key),
        _load_seconds(raw["analytic_us"]),
        _load_seconds(raw["tuned_us"]),
        tuple(_load_trial(trial, is_schedule) for trial in trials),
        _load_text("failure", raw["failure"]),
    )
    if entry.failure and entry.choice is not None:
        raise ValueError(f"choice must be null beside a failure, got {_shown(raw['choice'])}")
    if is_schedule and entry.choice is None and not entry.failure:
        raise ValueError("choice must be the name of a schedule, got null")
    for choice in (entry.choice, *(trial.choice for trial in entry.trials)):
        if choice is not None and not is_schedule and type(choice) not in kind.configs:
            raise ValueError(f"{kind.name} has no {type(choice).__name__}")
    return entry


def dump_sections(sections: Mapping[Origin, Mapping[str, Entry]]) -> str:
    """The text of a file of tuned entries."""
    raw = {
        "schema": SCHEMA,
        "sections": [
            {**asdict(origin), "entries": {key: dump_entry(entries[key]) for key in sorted(entries)}}
            for origin, entries in sections.items()
        ],
    }
    return to_json(raw)


def to_json(raw: Any) -> str:
    """The text of a file of tuned entries, without blanks: its size is limited."""
    return json.dumps(raw, separators=(",", ":")) + "\n"


def load_sections(text: str) -> tuple[Sections, list[str]]:
    """What a file holds, and a complaint for each entry in it that is ignored.

    Raises:
        NewerFileError: a newer version wrote it.
        BrokenFileError: it is no such file.
    """
    sections: Sections = {}
    complaints = []
    for raw in load_raw(text)["sections"]:
        origin = _load_origin(raw)
        entries = sections.setdefault(origin, {})
        for key, value in raw["entries"].items():
            try:
                entries[key] = load_entry(key, value)
            except ValueError as error:
                complaints.append(f"{_shown(key)}: {error}")
    return sections, complaints


def load_raw(text: str) -> dict[str, Any]:
    """The JSON of a file, checked down to its sections; the entries are not looked at.

    Raises:
        NewerFileError: a newer version wrote it.
        BrokenFileError: it is no such file.
    """

    def reject(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    if len(text) > MAX_BYTES:
        raise BrokenFileError(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        raw = json.loads(text, parse_constant=reject)
    except RecursionError:
        raise BrokenFileError("it is nested too deeply") from None
    except ValueError as error:
        raise BrokenFileError(f"it is no JSON: {error}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema < 1:
        raise BrokenFileError("it has no schema")
    if schema > SCHEMA:
        raise NewerFileError(f"its schema is {schema}; this version of sk_triton reads {SCHEMA}")
    sections = raw.get("sections")
    if set(raw) != {"schema", "sections"} or not isinstance(sections, list):
        raise BrokenFileError("it must hold schema and a list of sections")
    for section in sections:
        _load_origin(section)
    return raw


def _load_origin(raw: Any) -> Origin:
    names = [field.name for field in fields(Origin)]
    if not isinstance(raw, dict) or set(raw) != {*names, "entries"} or not isinstance(raw["entries"], dict):
        raise BrokenFileError(f"a section must be an object of {', '.join(names)} and entries")
    for name in names:
        value = raw[name]
        if name == "processors":
            is_sound = type(value) is int and 1 <= value <= MAX_FIELD
        else:
            # Printed in terminals: no control characters.
            is_sound = isinstance(value, str) and 0 < len(value) <= MAX_TEXT and value.isprintable()
        if not is_sound:
            raise BrokenFileError(f"{name} of a section must not be {_shown(value)}")
    return Origin(**{name: raw[name] for name in names})


def _load_trial(raw: Any, is_schedule: bool) -> Trial:
    if not isinstance(raw, dict) or set(raw) != {"choice", "predicted_us", "measured_us", "dropped"}:
        raise ValueError("a trial must be an object of choice, predicted_us, measured_us and dropped")
    dropped = _load_text("dropped", raw["dropped"])
    predicted, measured = (
        None if raw[name] is None else _load_seconds(raw[name]) for name in ("predicted_us", "measured_us")
    )
    return Trial(_load_choice(raw["choice"], is_schedule), predicted, measured, dropped)


def _dump_choice(choice: Choice) -> Any:
    return choice if isinstance(choice, str) else dump_config(choice)


def _load_choice(raw: Any, is_schedule: bool) -> Choice:
    if not is_schedule:
        return load_config(raw)
    if not isinstance(raw, str) or not raw.isidentifier() or len(raw) > MAX_TEXT:
        raise ValueError(f"a schedule must be a name, got {_shown(raw)}")
    return raw


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e6, 3)


def _load_samples(raw: Any, key: str) -> int:
    most = most_samples(key)
    if type(raw) is not int or not most // 2 < raw <= most:
        raise ValueError(f"n must be between {most // 2 + 1} and {most}, as its key says, got {_shown(raw)}")
    return raw


def _load_text(name: str, raw: Any) -> str:
    if not isinstance(raw, str) or not (raw + " ").isprintable():
        raise ValueError(f"{name} must be a printable text, got {_shown(raw)}")
    return raw


def _load_seconds(raw: Any) -> float:
    # A whole number is compared, not made a float: one of over 308 digits is none.
    if type(raw) not in (int, float) or not 0 <= raw <= MAX_MICROSECONDS:
        raise ValueError(f"a time must be a finite number of microseconds, got {_shown(raw)}")
    return raw / 1e6


def _printable(text: str) -> str:
    """One line of what a compiler or a driver said."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_TEXT]


def _shown(value: Any) -> str:
    """A value as a message shows it: what a stranger wrote may be long, or mean something to a terminal."""
    return ascii(value)[:80]
