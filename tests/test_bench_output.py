"""What a benchmark leaves behind: the results file, the table and the plot."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console

from sk_triton.bench import inputs, plots, providers, results, suite, table
from sk_triton.bench.shapes import STAGES

CPU = torch.device("cpu")


def some_results(device_type="cpu", **changes) -> results.Results:
    """Every status at least once, in two dtypes and both units."""
    stamp = dataclasses.replace(results.stamp(CPU), device_type=device_type, device="Some Device", load=0.0)
    records = []
    for unit in providers.UNITS:
        for dtype in ("fp16", "fp32"):
            for batch in (1, 8):
                case = suite.Case(providers.UNITS[unit], STAGES[2], batch, dtype)
                for index, provider in enumerate(providers.providers(unit, device_type, quick=False)):
                    ms = batch * (1.0 + index) * (0.25 if provider.source.ours else 1)
                    checks = tuple(results.Check(kind, 1e-4, 1e-4, 2e-4, True) for kind in inputs.KINDS)
                    timing = results.Timing(ms, ms * 0.95, ms * 1.05, 9)
                    record = suite._blank(case, provider)
                    records.append(
                        dataclasses.replace(record, status=results.OK, checks=checks, timing=timing)
                    )
    return results.Results("layer", 0, stamp, tuple(records), **changes)


def with_status(run, position, status, message="some reason"):
    records = list(run.records)
    records[position] = dataclasses.replace(
        records[position], status=status, message=message, timing=None, checks=()
    )
    return dataclasses.replace(run, records=tuple(records))


def test_results_survive_their_file(tmp_path):
    run = with_status(some_results(interrupted=True), 0, results.WRONG)
    failed = dataclasses.replace(run.records[1], checks=(results.Check("photo", None, 0.1, 0.2, False),))
    run = dataclasses.replace(run, records=(failed, *run.records[1:]))
    path = tmp_path / "run.json"
    results.save(run, path)

    assert results.load(path) == run
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    json.loads(
        path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in the JSON")
    )


def test_another_schema_is_refused(tmp_path):
    data = json.loads(some_results().to_json())
    data["schema"] = 99
    with pytest.raises(ValueError, match="schema must be 1, got 99"):
        results.Results.from_json(json.dumps(data))


def test_the_stamp_says_where_and_with_what_it_was_measured():
    stamp = results.stamp(CPU)
    assert stamp.torch == torch.__version__
    assert stamp.threads == torch.get_num_threads()
    assert stamp.device
    assert stamp.date.endswith("+00:00")
    assert stamp.driver is None


def test_fastest_peer_ignores_ours():
    case = results.by_case(some_results().records)[("seed", "fp32", 2, 8)]
    assert results.fastest_peer(case).label == "seed document's SKConv, NCHW"
    assert results.fastest_ours(case).ours


def printed(run) -> str:
    stream = io.StringIO()
    table.show(run, Console(file=stream, width=120))
    return stream.getvalue()


def test_the_table_compares_with_the_fastest_peer_and_says_cpu():
    text = printed(some_results())
    assert "CPU: Some Device" in text
    assert "sk_triton (CPU reference path), channels_last" in text
    assert "1.33x the speed of the fastest peer" in text
    assert "plain PyTorch reference" in text


def test_a_busy_machine_is_mentioned():
    run = some_results()
    busy = dataclasses.replace(run, stamp=dataclasses.replace(run.stamp, load=3.0, cpus=4))
    assert "load 3.0 on 4 CPUs" in printed(busy)
    assert "busy" not in printed(run)


def test_the_table_claims_nothing_within_the_noise():
    run = some_results()
    noisy = [
        dataclasses.replace(r, timing=dataclasses.replace(r.timing, q20_ms=0.1, q80_ms=99.0))
        for r in run.records
    ]
    text = printed(dataclasses.replace(run, records=tuple(noisy)))
    assert "no difference beyond the noise" in text
    assert "x the speed" not in text


@pytest.mark.parametrize(
    "status", [results.WRONG, results.FAILED, results.OUT_OF_MEMORY, results.SKIPPED, results.NOT_MEASURED]
)
def test_the_table_shows_every_status_and_a_wrong_result_ends_all_claims(status):
    text = printed(with_status(some_results(), 0, status))
    assert status in text
    assert ("some reason" in text) == (status != results.NOT_MEASURED)
    assert ("No speed is claimed" in text) == (status == results.WRONG)
    assert ("x the speed" in text) == (status != results.WRONG)


def test_every_source_and_form_has_its_own_colour_and_hatch():
    everyone = [
        p
        for unit in providers.UNITS
        for kind in ("cpu", "cuda")
        for p in providers.providers(unit, kind, False)
    ]
    assert {p.source.key for p in everyone} == set(plots.SOURCE_COLOURS)
    assert {p.form.key for p in everyone} == set(plots.FORM_HATCHES)
    assert len(set(plots.SOURCE_COLOURS.values())) == len(plots.SOURCE_COLOURS)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_plot_is_a_picture_with_every_peers_colour(device_type, tmp_path):
    run = with_status(some_results(device_type), 1, results.OUT_OF_MEMORY)
    paths = plots.save_plots(run, tmp_path)

    assert [path.name for path in paths] == [f"layer-{device_type}-{dtype}.png" for dtype in ("fp16", "fp32")]
    for path in paths:
        picture = imread(path)
        assert picture.shape[1] == 1600
        if picture.shape[2] == 4:
            assert picture[..., 3].min() == 1
        pixels = picture[..., :3].reshape(-1, 3)
        for source in {record.source for record in run.records}:
            near = abs(pixels - to_rgb(plots.SOURCE_COLOURS[source])).max(1) < 0.02
            assert near.mean() > 0.002, source


def figure_words(run) -> str:
    figure = plots.draw(run, "fp32")
    return "\n".join(artist.get_text() for artist in figure.findobj(match=lambda a: hasattr(a, "get_text")))


def test_the_plot_says_cpu_dtype_batch_device_and_what_went_wrong():
    words = figure_words(some_results())
    for expected in ("CPU: Some Device", "fp32", "batch 8", "Measured on a CPU", "256@28²", "NCHW"):
        assert expected in words
    assert "no speed is claimed" not in words
    assert "Measured on a CPU" not in figure_words(some_results("cuda"))
    assert "no speed is claimed" in figure_words(with_status(some_results("cuda"), 0, results.WRONG))
