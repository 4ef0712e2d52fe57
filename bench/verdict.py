"""sk_triton against the fastest measured peer, case by case, in the numbers and words that every output shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from . import results
from .formats import NOTHING, ratio, three_digits
from .measuring.forms import BY_KEY
from .results import SK_TRITON, Record, Results
from .shapes import Case

HOST_BOUND_SHARE = 0.9
"""Of a call's time: where the host needs as much until the call returns, the device waits for it."""

HOST_BOUND = "host-bound"


@dataclass(frozen=True)
class Comparison:
    """sk_triton against the fastest peer that was measured in one case.

    ours: its fastest form, or, where none was timed, the first one; peer and floor were timed, or are None.
    """

    case: Case
    ours: Record
    peer: Record | None
    floor: Record | None

    @property
    def speedup(self) -> float | None:
        """The fastest peer's median over ours; None where one of them is missing."""
        if self.peer is None or self.peer.timing is None or self.ours.timing is None:
            return None
        return self.peer.timing.median_ms / self.ours.timing.median_ms

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the bands from the 20 % to the 80 % quantile do not overlap."""
        if self.peer is None or self.peer.timing is None or self.ours.timing is None:
            return False
        ours, peer = self.ours.timing, self.peer.timing
        return ours.q20_ms > peer.q80_ms or peer.q20_ms > ours.q80_ms

    @property
    def is_loss(self) -> bool:
        """Slower than the fastest peer, be it within the noise, or not able to run where a peer can."""
        return self.peer is not None and (self.speedup is None or self.speedup < 1)

    @property
    def is_ours_alone_in_graph(self) -> bool:
        """Whether sk_triton is in a CUDA graph, and the peer is not."""
        return (
            self.speedup is not None
            and self.peer is not None
            and is_graph(self.ours)
            and not is_graph(self.peer)
        )

    @property
    def is_peer_host_bound(self) -> bool:
        """Whether the peer waits for the host, where sk_triton in its graph does not."""
        peer = self.peer
        if not self.is_ours_alone_in_graph or peer is None or peer.timing is None or peer.host_us is None:
            return False
        return peer.host_us >= HOST_BOUND_SHARE * peer.timing.median_ms * 1e3

    @property
    def peer_name(self) -> str:
        """The peer's label, and whether it waits for the host; "" without one."""
        if self.peer is None:
            return ""
        return f"{self.peer.label}; {HOST_BOUND}" if self.is_peer_host_bound else self.peer.label

    @property
    def floor_share(self) -> float | None:
        """The memory floor's time as a share of ours: 1 is what memory allows."""
        if self.floor is None or self.floor.timing is None or self.ours.timing is None:
            return None
        return self.floor.timing.median_ms / self.ours.timing.median_ms


def cases_in_order(run: Results) -> dict[Case, list[Record]]:
    """Records by case, from narrow to wide stages and small to large batches, whatever order they were measured in."""
    groups = results.by_case(run.records)

    def place(case: Case) -> tuple[int, int, float, int]:
        if case.axis is not None:
            return (0, 0, case.value or 0.0, 0)
        return (case.shape.channels, case.shape.height, 0.0, case.batch)

    axes = list(dict.fromkeys((case.subject, case.dtype, case.direction, case.axis) for case in groups))
    in_order = sorted(
        groups,
        key=lambda case: (axes.index((case.subject, case.dtype, case.direction, case.axis)), place(case)),
    )
    return {case: groups[case] for case in in_order}


def comparisons(run: Results) -> list[Comparison]:
    """One for each case in which sk_triton took part, in order."""
    found = []
    for case, records in cases_in_order(run).items():
        ours = sk_triton_records(records)
        if ours:
            best = results.fastest_ours(ours) or ours[0]
            found.append(Comparison(case, best, results.fastest_peer(records), results.floor(records)))
    return found


def sk_triton_records(records: list[Record]) -> list[Record]:
    """The forms of sk_triton as its users get it; a forced schedule counts only where nothing else ran."""
    ours = [record for record in records if record.ours]
    return [record for record in ours if record.source == SK_TRITON] or ours


def is_graph(record: Record) -> bool:
    """Whether a record is of a call in a CUDA graph."""
    form = BY_KEY.get(record.form)
    return form is not None and form.is_graph


def speed_summary(compared: list[Comparison], peer: str = "the fastest measured peer") -> str | None:
    """sk_triton's speed over some cases in one sentence, a geometric mean; None without a case to compare in.

    Cases that sk_triton could not run have no speed: how many the mean is over is said where it is not over all.
    `peer`: what it is compared with.
    """
    ratios = [comparison.speedup for comparison in compared if comparison.speedup is not None]
    if not ratios:
        return None
    behind = losses_count(compared)
    with_peer = sum(comparison.peer is not None for comparison in compared)
    over = f" over {len(ratios)} of {with_peer} cases" if len(ratios) < with_peer else ""
    if not any(comparison.is_beyond_noise for comparison in compared):
        return f"no difference beyond the noise from {peer}{over}, behind in {behind}"
    mean = f"{ratio(geometric_mean(ratios))} the speed of {peer}"
    spread = f" ({ratio(min(ratios))} to {ratio(max(ratios))})" if len(ratios) > 1 else ""
    return f"{mean}{spread}{over}, behind in {behind}"


def graph_summary(compared: list[Comparison]) -> str | None:
    """In how many cases sk_triton alone is in a CUDA graph, and the peer waits for the host; None for none."""
    alone = sum(comparison.is_ours_alone_in_graph for comparison in compared)
    bound = sum(comparison.is_peer_host_bound for comparison in compared)
    if not alone:
        return None
    cases = f"{alone} of {sum(comparison.peer is not None for comparison in compared)} cases"
    of_them = f"; {bound} of these peers wait{'s' * (bound == 1)} for the host" if bound else ""
    return f"in {cases} sk_triton is in a CUDA graph and that peer is not{of_them}"


def losses(compared: list[Comparison]) -> list[str]:
    """A line for each case that is lost to the fastest peer."""
    return [f"{comparison.case.title}: {_loss(comparison)}" for comparison in compared if comparison.is_loss]


def losses_count(compared: list[Comparison]) -> str:
    """In how many of the cases with a peer sk_triton loses: "2 of 20 cases"."""
    lost = sum(comparison.is_loss for comparison in compared)
    cases = sum(comparison.peer is not None for comparison in compared)
    return f"{lost} of {cases} case{'s' * (cases != 1)}"


def _loss(comparison: Comparison) -> str:
    assert comparison.peer is not None
    if comparison.speedup is None:
        return f"{comparison.ours.status}, where {comparison.peer.label} runs"
    noise = "" if comparison.is_beyond_noise else ", within the noise"
    return f"{ratio(comparison.speedup)} the speed of {comparison.peer.label}{noise}"


def host_bound_note(run: Results, compared: Sequence[Comparison]) -> str:
    """What stands below a table in which peers wait for the host; "" where none does."""
    if not run.sound or not any(comparison.is_peer_host_bound for comparison in compared):
        return ""
    return f"{HOST_BOUND}: out of a CUDA graph, the device waits for the host; sk_triton is in a graph."


def cells(run: Results, comparison: Comparison, ours: str) -> tuple[str, str, str, str, str]:
    """A case's row of a table: its title, sk_triton's time, called `ours`, and the peer's, the speed-up, the share of
    the memory floor. No speed-up where none may be claimed."""
    share = f"{comparison.floor_share:.0%}" if comparison.floor_share else NOTHING
    return (
        comparison.case.title,
        _time_and_name(comparison.ours, ours),
        _time_and_name(comparison.peer, comparison.peer_name) if comparison.peer else NOTHING,
        _speedup_cell(run, comparison),
        share,
    )


def _speedup_cell(run: Results, comparison: Comparison) -> str:
    if not run.sound or comparison.speedup is None:
        return NOTHING
    return ratio(comparison.speedup) + ("" if comparison.is_beyond_noise else " (noise)")


def _time_and_name(record: Record, name: str) -> str:
    if record.timing is None:
        return NOTHING if record.status == results.OK else record.status
    name = "; ".join(part for part in (name, record.commit and f"at {record.commit}") if part)
    time = three_digits(record.timing.median_ms)
    return f"{time} ({name})" if name else time
