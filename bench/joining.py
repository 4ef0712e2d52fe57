"""Several runs of one suite on one device as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .results import PEER, Ceilings, Record, Results, by_case, fastest_peer, finished_cases, lasting_notes
from .shapes import Case


def join(runs: Sequence[Results]) -> Results:
    """Runs of one suite on one device as one.

    In each case sk_triton and the floor are those of the latest run that finished it, and each peer is, form by form,
    the fastest of all runs whose settings are that run's (`Stamp.runs_peers_like`): a peer's code is the same at every
    commit. The result carries the latest run's stamp; records of other runs say their commit.

    Raises:
        ValueError: several suites or devices.
    """
    if len({(run.suite, run.stamp.device) for run in runs}) != 1:
        raise ValueError("runs must be of one suite on one device")
    newest, *older = sorted(runs, key=lambda run: run.stamp.date, reverse=True)
    if not older:
        return newest
    found: dict[Case, list[tuple[Results, list[Record]]]] = {}
    for run in (newest, *older):
        commit = None if run is newest else _name(run)
        records = [dataclasses.replace(record, commit=commit) for record in finished_cases(run.records, 1)]
        for case, group in by_case(records).items():
            found.setdefault(case, []).append((run, group))
    joined = [record for groups in found.values() for record in _with_fastest_peers(groups)]
    notes = lasting_notes(newest)
    for run in older:
        if any(record.commit == _name(run) for record in joined):
            notes += [f"{_name(run)}: {note}" for note in lasting_notes(run)]
            differing = sorted(
                {*newest.stamp.differences(run.stamp)} - {"git_commit", "git_dirty", "source_hash"}
            )
            notes += [f"{_name(run)}: other {', '.join(differing)}"] if differing else []
    return dataclasses.replace(
        newest,
        records=(*joined, *(record for record in newest.records if record.case not in found)),
        ceilings=_joined_ceilings([run.ceilings for run in (newest, *older)]),
        clocks=tuple(clock for run in (newest, *older) for clock in run.clocks),
        interrupted=False,
        notes=tuple(dict.fromkeys(notes)),
        unmeasured=tuple(case for case in newest.unmeasured if case not in found),
    )


def _name(run: Results) -> str:
    """What a joined run is called: its commit, or without one its date."""
    return run.stamp.git_commit[:9] if run.stamp.git_commit else run.stamp.date[:10]


def _with_fastest_peers(groups: Sequence[tuple[Results, list[Record]]]) -> list[Record]:
    """The first run's records of a case, peers replaced and completed by faster ones of later entries."""
    (first, own), *others = groups
    found = {record.key: [record] for record in own}
    for run, records in others:
        if run.stamp.runs_peers_like(first.stamp):
            for record in records:
                if record.role == PEER and record.timing:
                    found.setdefault(record.key, []).append(record)
    return [fastest_peer(same) or same[0] for same in found.values()]


def _joined_ceilings(found: Sequence[Ceilings | None]) -> Ceilings | None:
    """The first one, with the rates of dtypes that only later ones have."""
    present = [ceilings for ceilings in found if ceilings is not None]
    if not present:
        return None
    rates = {
        dtype: rate for ceilings in reversed(present) for dtype, rate in ceilings.matrix_flop_per_s.items()
    }
    return Ceilings(present[0].copy_bytes_per_s, rates)
