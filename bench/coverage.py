"""Which of the peers' default forms a run did not measure, told from its records."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from . import results
from .measuring.forms import BY_KEY, CHANNELS_LAST, NCHW, Form
from .measuring.providers import Provider, competitors
from .results import PEER, Record, Results
from .shapes import UNITS, Case
from .verdict import comparisons

FORMATS = (NCHW.label, CHANNELS_LAST.label)
MOST_CASES = 4
"""More than these are counted, not listed."""

Place = tuple[Case, str]
"""A case and a peer's name."""


@dataclass(frozen=True)
class Gap:
    """What was not measured, and where.

    is_whole: a peer in every form, or a way to run it in both memory formats.
    """

    what: tuple[str, ...]
    where: str
    is_whole: bool

    @property
    def words(self) -> str:
        return f"{_listed(self.what)} {self.where}".rstrip()


def gaps(run: Results, cases: Collection[Case] | None = None) -> list[Gap]:
    """What `sk-triton bench` runs of the peers by default and this run did not, in the cases that were compared.

    `cases`: look at these alone.
    """
    compared = [c.case for c in comparisons(run) if c.peer and (cases is None or c.case in cases)]
    records = results.by_case(run.records)
    peers: dict[str, set[Place]] = {}
    ways: dict[tuple[str, bool], set[Place]] = {}
    measured: set[Place] = set()
    for case in compared:
        for peer, missing in _missing(run, case, records[case]).items():
            if missing is None:
                peers.setdefault(peer, set()).add((case, peer))
                continue
            measured.add((case, peer))
            for gap in missing.items():
                ways.setdefault(gap, set()).add((case, peer))
    found = [
        Gap((peer,), _where(places, {(case, peer) for case in compared}, names_peer=False), True)
        for peer, places in peers.items()
    ]
    alike: dict[tuple[bool, str], list[str]] = {}
    for (way, is_whole), places in sorted(ways.items(), key=lambda item: _order(item[0][0])):
        alike.setdefault((is_whole, _where(places, measured, names_peer=True)), []).append(way)
    found += [Gap(tuple(what), where, is_whole) for (is_whole, where), what in alike.items()]
    return sorted(found, key=lambda gap: not gap.is_whole)


def headline(run: Results, cases: Collection[Case] | None = None) -> str | None:
    """Of the gaps the whole ones in a phrase to put behind a speed: "CUDA graph + torch.compile at batch 128"."""
    return "; ".join(gap.words for gap in gaps(run, cases) if gap.is_whole) or None


def sentence(run: Results, cases: Collection[Case] | None = None) -> str | None:
    """Every gap; None where the peers ran in all of their forms."""
    found = gaps(run, cases)
    return (
        f"Not measured of the peers' default forms: {'; '.join(gap.words for gap in found)}."
        if found
        else None
    )


def _missing(run: Results, case: Case, records: list[Record]) -> dict[str, dict[str, bool] | None]:
    """By peer what did not run, and whether in any memory format; None for a peer of which nothing ran."""
    tried = {
        record.key for record in records if record.role == PEER and record.status != results.NOT_MEASURED
    }
    wanted: dict[str, list[Provider]] = {}
    is_nvidia = run.stamp.torch_built_for.startswith("CUDA")
    for provider in competitors(case, run.stamp.device_type, quick=False, is_nvidia=is_nvidia):
        if provider.source.role == PEER:
            wanted.setdefault(provider.source.label, []).append(provider)
    found: dict[str, dict[str, bool] | None] = {}
    for peer, providers in wanted.items():
        absent = [provider for provider in providers if provider.key not in tried]
        if len(absent) == len(providers):
            found[peer] = None
        else:
            found[peer] = _by_way([p.form for p in absent], [p.form for p in providers])
    return found


def _by_way(absent: Iterable[Form], wanted: Iterable[Form]) -> dict[str, bool]:
    """Ways to run a peer that lack a memory format: "CUDA graph in NCHW", or the way alone where it lacks all."""
    formats: dict[str, list[str]] = {}
    for form in absent:
        formats.setdefault(_way(form), []).append(_format(form))
    every: dict[str, list[str]] = {}
    for form in wanted:
        every.setdefault(_way(form), []).append(_format(form))
    return {
        way if found == every[way] else f"{way} in {_listed(found)}": found == every[way]
        for way, found in formats.items()
    }


def _way(form: Form) -> str:
    """A form's label without its memory format."""
    return " + ".join(part for part in form.label.split(", ") if part not in FORMATS) or "eager"


def _format(form: Form) -> str:
    return next(part for part in form.label.split(", ") if part in FORMATS)


def _order(way: str) -> int:
    """As forms stand in their list."""
    return next(index for index, form in enumerate(BY_KEY.values()) if _way(form) == way.partition(" in ")[0])


def _where(places: set[Place], every: set[Place], names_peer: bool) -> str:
    """Some of `every` place, described by what they have in common and the others do not; "" for all."""
    if places == every:
        return ""
    batches = {case.batch for case, _ in places}
    if places == {place for place in every if place[0].batch in batches}:
        return f"at batch {_listed(map(str, sorted(batches)))}"
    subjects = {case.subject for case, _ in places}
    if places == {place for place in every if place[0].subject in subjects}:
        unit = " unit" if subjects <= {*UNITS} else ""
        return f"of the {_listed(sorted(subjects))}{unit}"
    cases = sorted({case for case, _ in places}, key=lambda case: (case.shape.channels, case.title))
    has_one_subject = len({(case.subject, case.batch) for case, _ in every}) == 1
    names = dict.fromkeys(case.shape.name if has_one_subject else case.short_title for case in cases)
    where = f"in {_listed(names)}" if len(names) <= MOST_CASES else f"in {len(cases)} cases"
    return f"of {_listed(sorted({peer for _, peer in places}))} {where}" if names_peer else where


def _listed(parts: Iterable[str]) -> str:
    """ "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
