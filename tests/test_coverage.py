"""What a run did not measure of the peers, told from its records."""

from __future__ import annotations

import dataclasses

import pytest

from sk_triton.bench import coverage, results
from sk_triton.bench.measuring.providers import competitors
from sk_triton.bench.shapes import CLASSIC, PAPER

from .drawn_pictures import Figures, words
from .printed import printed
from .synthetic_results import a_stamp, small

ROCM = a_stamp(torch_built_for="ROCm 7.0")
"""Without the forms that are for NVIDIA's GPUs, which the synthetic runs lack."""


def without(run, left_out):
    return dataclasses.replace(run, records=tuple(r for r in run.records if not left_out(r)))


def test_a_run_of_every_default_form_has_no_gap():
    assert coverage.gaps(small(stamp=ROCM)) == []
    assert coverage.sentence(small("cpu")) is None
    assert coverage.headline(small("cpu")) is None
    assert "cudnn.benchmark off" in coverage.headline(small())


@pytest.mark.parametrize(
    ("left_out", "headline", "sentence"),
    [
        (lambda r: r.form.startswith("graph-compile"), "CUDA graph + torch.compile", ""),
        (lambda r: r.form == "compile-nchw" and not r.ours, None, "torch.compile in NCHW"),
        (
            lambda r: r.form.startswith("compile") and r.case.batch == 8,
            "torch.compile at batch 8",
            "",
        ),
        (lambda r: r.source == "plain-classic", "plain PyTorch of the classic unit", ""),
        (
            lambda r: r.source == "timm" and r.form.startswith("graph-n") and r.case.batch == 1,
            None,
            "CUDA graph in NCHW of timm in paper 128@56² batch 1",
        ),
    ],
)
def test_gaps_are_named_with_their_place(left_out, headline, sentence):
    run = without(small(stamp=ROCM), left_out)
    assert coverage.headline(run) == headline
    assert coverage.sentence(run) == f"Not measured of the peers' default forms: {headline or sentence}."


def test_what_failed_was_tried():
    run = small(stamp=ROCM)
    records = tuple(
        dataclasses.replace(r, status=results.FAILED, timing=None) if r.form == "compile-nchw" else r
        for r in run.records
    )
    assert coverage.gaps(dataclasses.replace(run, records=records)) == []
    broken_off = tuple(
        dataclasses.replace(r, status=results.NOT_MEASURED, timing=None) if r.form == "compile-nchw" else r
        for r in run.records
    )
    assert coverage.sentence(dataclasses.replace(run, records=broken_off)).endswith("torch.compile in NCHW.")


def test_a_quick_run_names_what_it_left_out_in_table_and_picture():
    full = small()
    quick = without(
        full,
        lambda r: (
            r.role == results.PEER
            and r.key not in {provider.key for provider in competitors(r.case, "cuda", quick=True)}
        ),
    )
    assert {r.source for r in quick.records} == {r.source for r in full.records}
    assert coverage.headline(quick).startswith("torch.compile")
    text = printed(quick)
    for unit in (CLASSIC, PAPER):
        line = next(line for line in text.splitlines() if line.startswith(f"{unit} fp16 inference: "))
        assert "; not measured: torch.compile" in line
    headline = words(Figures(quick)[f"speed-{PAPER}-fp16"]).replace("\n", " ")
    assert "not measured: torch.compile" in headline
