"""What a benchmark leaves behind: the results file, the terminal table, CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re

import pytest
import torch

from sk_triton.bench import csv_file, formats, markdown, results, stamp, text_file, verdict
from sk_triton.bench.report import page as report_page
from sk_triton.bench.results import Check, Timing
from sk_triton.bench.shapes import CLASSIC, PAPER

from .printed import printed
from .synthetic_results import a_stamp, changed, slowed, small, some_results, with_status


def test_results_survive_their_file(tmp_path):
    run = with_status(small(interrupted=True, objections=("one",), notes=("two",)), 0, results.WRONG)
    failed = dataclasses.replace(run.records[1], checks=(Check("photo", "v", None, 0.1, 0.2, False),))
    run = dataclasses.replace(run, records=(failed, *run.records[1:]))
    path = tmp_path / "run.json"
    results.save(run, path)

    assert results.load(path) == run
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    json.loads(
        path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in the JSON")
    )


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "run.json", os.replace
    first, second = small(), small(interrupted=True)

    def save_another_before(partial, whole):
        monkeypatch.setattr(text_file.os, "replace", replace)
        results.save(second, path)
        replace(partial, whole)

    monkeypatch.setattr(text_file.os, "replace", save_another_before)
    results.save(first, path)
    assert results.load(path) == first
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("write", [results.save, csv_file.write_csv])
def test_a_write_that_fails_leaves_nothing(tmp_path, write):
    (tmp_path / "run").mkdir()
    with pytest.raises(IsADirectoryError):
        write(small(), tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_another_schema_is_refused():
    data = json.loads(small().to_json())
    data["schema"] = 99
    with pytest.raises(ValueError, match=f"schema must be {results.SCHEMA}, got 99"):
        results.Results.from_json(json.dumps(data))


def test_the_stamp_says_where_and_with_what_it_was_measured():
    taken = stamp.take_stamp(torch.device("cpu"))
    assert taken.torch == torch.__version__
    assert taken.threads == torch.get_num_threads()
    assert taken.device
    assert taken.date.endswith("+00:00")
    assert taken.driver is None


def test_a_case_compares_the_fastest_forms_and_the_floor():
    run = small()
    for comparison in verdict.comparisons(run):
        records = [record for record in run.records if record.case == comparison.case and record.timing]
        medians = {record.key: record.timing.median_ms for record in records}
        assert comparison.ours.timing.median_ms == min(medians[r.key] for r in records if r.ours)
        assert comparison.peer.timing.median_ms == min(
            medians[r.key] for r in records if r.role == results.PEER
        )
        assert comparison.speedup == comparison.peer.timing.median_ms / comparison.ours.timing.median_ms
        assert comparison.floor_share == medians["copy/"] / comparison.ours.timing.median_ms


def test_a_forced_schedule_claims_nothing_where_users_get_another():
    run = slowed(small(every=True), 0.01, lambda record: record.source == "ours-resident")
    assert {comparison.ours.source for comparison in verdict.comparisons(run)} == {"ours"}
    forced = tuple(record for record in run.records if record.source != "ours")
    alone = dataclasses.replace(run, records=forced)
    assert {comparison.ours.source for comparison in verdict.comparisons(alone)} == {"ours-resident"}


def test_a_case_that_only_peers_can_run_is_lost():
    run = small()
    for position, record in enumerate(run.records):
        if record.ours:
            run = with_status(run, position, results.OUT_OF_MEMORY)
    compared = verdict.comparisons(run)
    assert all(comparison.is_loss for comparison in compared)
    assert verdict.losses_count(compared) == "4 of 4 cases"
    assert all("out of memory" in line for line in verdict.losses(compared))


@pytest.mark.parametrize(
    ("value", "text"), [(0.98765, "0.988"), (1.0, "1.00"), (22, "22.0"), (99.96, "100"), (12345.6, "12346")]
)
def test_numbers_have_three_digits(value, text):
    assert formats.three_digits(value) == text


def test_bytes_and_ratios():
    assert [formats.byte_size(n) for n in (12, 2048, 3 * 2**20, 2**31)] == [
        "12 B",
        "2.00 KiB",
        "3.00 MiB",
        "2.00 GiB",
    ]
    assert [formats.ratio(n) for n in (0.954, 1, 9.996, 14.24)] == ["0.95x", "1.00x", "10.0x", "14.2x"]


def test_the_table_compares_with_the_fastest_peer_and_says_cpu():
    run = slowed(small("cpu", batches=(8,)), 0.5)
    text = printed(run)
    assert "CPU: AMD EPYC" in text
    assert "sk_triton, channels_last" in text
    speedups = {c.case.subject: c.speedup for c in verdict.comparisons(run)}
    assert f"classic fp32 inference: {speedups[CLASSIC]:.2f}x the speed of the fastest measured peer" in text
    assert f"paper fp32 inference: {speedups[PAPER]:.2f}x the speed of the fastest measured peer" in text
    assert "its kernels need a GPU" in text
    assert "We lose in 0 of 2 cases." in text


def test_the_table_lists_every_case_that_is_lost():
    run = slowed(small(), 30, lambda record: record.ours and record.case.batch == 8)
    text = printed(run)
    assert "We lose in 2 of 4 cases:" in text
    lost = text.partition("We lose")[2]
    for comparison in verdict.comparisons(run):
        assert (comparison.case.title in lost) == (comparison.case.batch == 8)


def test_the_mean_says_over_how_many_cases_it_is():
    run = small()
    assert " over " not in verdict.speed_summary(verdict.comparisons(run))
    first = run.records[0].case
    for position, record in enumerate(run.records):
        if record.ours and record.case == first:
            run = with_status(run, position, results.FAILED)
    summary = verdict.speed_summary(verdict.comparisons(run))
    assert " over 3 of 4 cases, behind in 1 of 4 cases" in summary


def with_host_time(run, share):
    """The run with peers' host times as a share of their medians, compiled ones alone."""
    records = (
        dataclasses.replace(r, host_us=share * r.timing.median_ms * 1e3) if r.role == results.PEER else r
        for r in run.records
        if r.role != results.PEER or r.form.startswith("compile")
    )
    return dataclasses.replace(run, records=tuple(records))


def test_a_peer_that_waits_for_the_host_beside_a_graph_is_marked():
    run = with_host_time(slowed(small(), 5, lambda r: r.ours and "graph" not in r.form), 0.95)
    compared = verdict.comparisons(run)
    assert all(c.is_ours_alone_in_graph and c.is_peer_host_bound for c in compared)
    assert verdict.graph_summary(compared) == (
        "in 4 of 4 cases sk_triton is in a CUDA graph and that peer is not; 4 of these peers wait for the host"
    )
    assert markdown.markdown_table(run).count("; host-bound)") == 4
    page = "".join(report_page._suite(run, {}))
    assert page.count("; host-bound)") == 4
    assert "the device waits for the host" in page
    quick = with_host_time(run, 0.5)
    assert not any(c.is_peer_host_bound for c in verdict.comparisons(quick))
    assert verdict.HOST_BOUND not in markdown.markdown_table(quick) + "".join(report_page._suite(quick, {}))
    ungraphed = dataclasses.replace(run, records=tuple(r for r in run.records if "graph" not in r.form))
    assert verdict.graph_summary(verdict.comparisons(ungraphed)) is None


def test_a_busy_machine_is_mentioned():
    busy = small("cpu", stamp=a_stamp("cpu", load=3.0, cpus=4))
    assert "load 3.0 on 4 CPUs" in printed(busy)
    assert "busy" not in printed(small("cpu"))


def test_the_table_claims_nothing_within_the_noise():
    text = printed(changed(small(), lambda record: True, q20_ms=0.01, q80_ms=100))
    assert "no difference beyond the noise" in text
    assert "x the speed of the fastest measured peer" not in text


@pytest.mark.parametrize(
    "status", [results.WRONG, results.FAILED, results.OUT_OF_MEMORY, results.SKIPPED, results.NOT_MEASURED]
)
def test_the_table_shows_every_status(status):
    text = printed(with_status(small(), 0, status))
    assert status in text
    assert ("some reason" in text) == (status != results.NOT_MEASURED)


def test_an_error_that_is_not_finite_is_not_passed_over():
    run = small(batches=(1,))
    record = run.records[0]
    checks = (*record.checks, dataclasses.replace(record.checks[0], error=None, passed=False))
    records = (dataclasses.replace(record, checks=checks), *run.records[1:])
    line = next(
        line
        for line in printed(dataclasses.replace(run, records=records)).splitlines()
        if record.label in line
    )
    assert line.rstrip().endswith("inf")


def with_revision(run, factor):
    """The run with another revision, so much slower than sk_triton in each case."""
    added = tuple(
        dataclasses.replace(
            record, source="rev-1", source_label="sk_triton at 1", role=results.REVISION,
            timing=Timing(*(ms * factor for ms in dataclasses.astuple(record.timing)[:3]), 200),
        )
        for record in run.records
        if record.source == "ours" and record.case.batch == 8
    )  # fmt: skip
    return dataclasses.replace(run, records=(*run.records, *added))


def test_a_revision_is_compared_beside_the_peers_and_never_among_them():
    run = small()
    faster, slower = with_revision(run, 0.5), with_revision(run, 2.0)
    assert verdict.comparisons(faster) == verdict.comparisons(run)
    text = printed(faster)
    assert "\n0.50x the speed of sk_triton at 1 (0.50x to 0.50x), behind in 2 of 2 cases\n" in text
    assert text.count(": 0.50x the speed of sk_triton at 1") == 2
    assert "We lose in 0 of 4 cases." in text
    assert "2.00x the speed of sk_triton at 1 (2.00x to 2.00x), behind in 0 of 2 cases" in printed(slower)
    assert "the speed of sk_triton" not in printed(run)
    assert "the speed of sk_triton" not in printed(dataclasses.replace(slower, objections=("a reason",)))


def test_a_revision_where_sk_triton_fails_is_said_to_be_compared_in_fewer_cases():
    run = with_revision(small(), 2.0)
    for position, record in enumerate(run.records):
        if record.ours and record.case.batch == 8 and record.case.subject == PAPER:
            run = with_status(run, position, results.FAILED)
    assert "2.00x the speed of sk_triton at 1 over 1 of 2 cases, behind in 1 of 2 cases" in printed(run)
    for position, record in enumerate(run.records):
        if record.ours:
            run = with_status(run, position, results.FAILED)
    assert "no case in common with sk_triton at 1, behind in 2 of 2 cases" in printed(run)


def test_a_complaint_is_listed_once():
    run = small()
    for position, record in enumerate(run.records):
        if record.key == "timm/nchw":
            run = with_status(run, position, results.FAILED, "no kernel image")
    text = printed(run)
    assert text.count("no kernel image") == 1
    assert "timm, NCHW (2 cases): no kernel image" in text


def test_objections_end_all_claims():
    text = printed(small(objections=("a first reason", "a second reason")))
    assert "No speed is claimed" in text
    assert "a first reason" in text
    assert "a second reason" in text
    assert "x the speed" not in text
    assert "We lose" not in text
    assert not re.search(r"\d\.\d\dx", text)


def test_notes_are_printed():
    assert "note: something to know" in printed(small(notes=("something to know",)))


@pytest.mark.parametrize(
    ("suite", "column"), [("train", "saved"), ("model", "images/s"), ("host", "launches"), ("sweep", "speed")]
)
def test_each_suite_has_its_columns(suite, column):
    assert column in printed(some_results(suite, batches=(1,), stages=(1,)))
    assert "images/s" not in printed(some_results("train", batches=(1,), stages=(1,)))


def test_columns_without_values_are_left_out():
    run = small()
    bare = tuple(
        dataclasses.replace(record, timing=None, warm=None, memory=None, checks=())
        for record in run.records
        if record.role != results.FLOOR
    )
    text = printed(dataclasses.replace(run, records=bare))
    assert "host µs" in text
    assert not any(word in text for word in ("warm ms", "speed", "error", "20-80 %", "We lose"))


def test_the_table_orders_cases_however_they_were_measured():
    run = small(batches=(128, 1, 8))
    batches = re.findall(r"128@56², batch (\d+)", printed(run))
    assert batches == ["1", "8", "128"] * 2


def read_csv(run, path):
    csv_file.write_csv(run, path)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_record_with_its_units(tmp_path):
    run = with_status(some_results("train", batches=(1,), stages=(1,)), 2, results.FAILED, "a, b\nc")
    rows = read_csv(run, tmp_path / "run.csv")
    assert len(rows) == len(run.records)
    for row, record in zip(rows, run.records, strict=True):
        case = record.case
        assert (row["source"], row["form"], row["role"]) == (record.source, record.form, record.role)
        assert tuple(map(int, row["kernels"].split())) == case.shape.kernels
        assert tuple(map(int, row["dilations"].split())) == case.shape.dilations
        assert (int(row["batch"]), row["dtype"], row["direction"]) == (case.batch, case.dtype, case.direction)
        assert row["message"] == (record.message or "")
        timing = (
            Timing(*(float(row[f"{name}_ms"]) for name in ("median", "q20", "q80")), int(row["samples"]))
            if row["samples"]
            else None
        )
        assert timing == record.timing
        assert row["peak_bytes"] == (str(record.memory.peak_bytes) if record.memory else "")
        assert row["stamp_device"] == run.stamp.device
        if record.checks:
            assert float(row["check_random_v_largest_error"]) == record.checks[0].error


def test_csv_has_a_column_for_every_field_of_a_record(tmp_path):
    (row, *_) = read_csv(small(), tmp_path / "run.csv")
    nested = {"case", "checks", "timing", "warm", "memory"}
    fields = {field.name for field in dataclasses.fields(results.Record)} - nested
    assert fields <= set(row)
    assert {f"warm_{field.name}" for field in dataclasses.fields(Timing)} <= set(row)


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_has_a_row_for_each_case():
    run = small()
    head, rule, *rows = markdown.markdown_table(run).splitlines()
    assert set(rule) == {"|", "-"}
    assert len(cells(head)) == 5
    compared = verdict.comparisons(run)
    for row, comparison in zip(rows, compared, strict=True):
        case, ours, peer, speedup, share = cells(row)
        assert case == comparison.case.title
        assert ours.startswith(formats.three_digits(comparison.ours.timing.median_ms))
        assert comparison.peer.label in peer
        assert speedup.strip("*").startswith(formats.ratio(comparison.speedup))
        assert share == f"{comparison.floor_share:.0%}"


def test_markdown_claims_nothing_against_an_objection():
    text = markdown.markdown_table(small(objections=("a reason",)))
    assert "No speed is claimed:** a reason" in text
    assert not re.search(r"\d\.\d\dx", text)
