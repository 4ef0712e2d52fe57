"""How many times sk_triton's time each peer takes, as the README shows it."""

from __future__ import annotations

import dataclasses

import pytest

from sk_triton.bench.peer_table import WAYS, peer_table
from sk_triton.bench.shapes import DIRECTIONS

from .synthetic_results import slowed, small, some_results


def rows(*runs):
    lines = peer_table(runs, "fp16").splitlines()
    return {cells[0]: cells[1:] for cells in (line[2:-2].split(" | ") for line in lines[2:])}


def test_each_peer_is_shown_in_its_fastest_form_of_a_kind():
    run = small(batches=(8, 128), dtypes=("fp16",))
    found = rows(run)
    assert found
    slower = rows(slowed(run, 2, lambda record: record.role == "peer"))
    for title, cells in found.items():
        for cell, twice in zip(cells, slower[title], strict=True):
            assert (cell == twice == "-") or float(twice[:-1]) == pytest.approx(
                2 * float(cell[:-1]), rel=0.01
            )
    ours = rows(slowed(run, 3, lambda record: record.ours and record.case.batch == 8))
    assert ours == found


def test_rows_stand_by_direction_peer_and_way():
    runs = [some_results(suite, batches=(128,), stages=(1, 4)) for suite in ("train", "layer")]
    titles = [title.rsplit(", ", 2) for title in rows(*runs)]
    directions = [direction for _, _, direction in titles]
    assert directions == sorted(directions, key=DIRECTIONS.index)
    assert {*directions} == {*DIRECTIONS}
    for direction in DIRECTIONS:
        peers = [peer for peer, _, other in titles if other == direction]
        assert peers == sorted(peers, key=peers.index)
        for peer in peers:
            ways = [way for other, way, _ in titles if (other, _) == (peer, direction)]
            assert ways == sorted({*ways}, key=WAYS.index)


def test_stages_that_nobody_timed_are_empty():
    assert all(
        [cell == "-" for cell in cells] == [False, True, True, True]
        for cells in rows(small(batches=(128,), dtypes=("fp16",))).values()
    )


def test_other_dtypes_and_batches_are_left_out():
    assert not rows(small(batches=(8,), dtypes=("fp16",)))
    assert not rows(small(batches=(128,), dtypes=("fp32",)))


def test_other_suites_are_left_out():
    run = small(batches=(128,), dtypes=("fp16",))
    other = dataclasses.replace(
        run,
        records=tuple(
            dataclasses.replace(record, case=dataclasses.replace(record.case, suite="grid"))
            for record in run.records
        ),
    )
    assert rows(run, slowed(other, 9, lambda record: record.role == "peer")) == rows(run)


def test_plain_pytorch_has_a_row_for_each_unit():
    titles = {*rows(small(batches=(128,), dtypes=("fp16",)))}
    assert {f"plain PyTorch ({unit}), eager, inference" for unit in ("classic", "paper")} <= titles
