"""`sk-triton plot`: pictures, CSV and Markdown of results files, and the README's generated parts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sk_triton import cli
from sk_triton.bench import joining, markdown, plots, readme, results

from .synthetic_results import a_stamp, slowed, small, some_results

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def saved(tmp_path):
    def save(name, run):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        results.save(run, path)
        return str(path)

    return save


def test_plot_writes_pictures_csv_and_markdown_beside_the_results(saved, tmp_path, capsys):
    path = saved("layer-cuda.json", small(batches=(8,)))
    assert cli.main(["plot", path, "--csv", "--markdown"]) == 0
    written = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert written == {entry for entry in tmp_path.iterdir() if entry.name != "layer-cuda.json"}
    names = {entry.name for entry in written}
    assert {
        "layer-cuda.csv",
        "layer-cuda.md",
        "layer-cuda-speed-paper-fp16.png",
        "layer-cuda-passes.png",
    } <= names


def test_plot_compares_several_results_and_keeps_their_pictures_apart(saved, tmp_path, capsys):
    first = saved("h100/layer-cuda.json", small(batches=(8,)))
    other = small(batches=(8,), stamp=a_stamp(device="Other Device"))
    second = saved("other/layer-cuda.json", other)
    assert cli.main(["plot", first, second, "--output", str(tmp_path / "out")]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert {f"{folder}-layer-cuda-speed-paper-fp16.png" for folder in ("h100", "other")} <= names
    assert "comparison-paper-inference-fp16.png" in names
    assert names == {entry.name for entry in (tmp_path / "out").iterdir()}


def test_plot_of_files_that_share_no_case_says_that_it_compares_nothing(saved, tmp_path, capsys):
    first = saved("layer-cuda.json", small(batches=(8,)))
    second = saved("train-cuda.json", some_results("train", batches=(8,), stages=(1,)))
    assert cli.main(["plot", first, second]) == 0
    assert "no comparison drawn" in capsys.readouterr().err


def test_a_picture_that_fails_is_named_and_the_others_are_drawn(saved, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("a font is missing")

    monkeypatch.setitem(plots.DRAWINGS["layer"], "speed", fail)
    assert cli.main(["plot", saved("layer-cuda.json", small(batches=(8,)))]) == 1
    captured = capsys.readouterr()
    assert "layer-cuda-passes.png" in captured.out
    assert "picture layer-cuda-speed-paper-fp16 failed: RuntimeError: a font is missing" in captured.err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("not JSON", "not a results file"),
        ("[" * 100_000, "not a results file: maximum recursion depth exceeded"),
        ("[1]", f"schema must be {results.SCHEMA}, got None"),
        ('{"schema": 1}', f"schema must be {results.SCHEMA}, got 1"),
        (f'{{"schema": {results.SCHEMA}}}', "not a results file of schema"),
    ],
)
def test_a_file_that_is_no_results_file_is_named(content, complaint, tmp_path, capsys):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert cli.main(["plot", str(path)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert str(path) in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("part", "name", "value", "allowed"),
    [
        ("case", "batch", "x", "a whole number from 1 on, got 'x'"),
        ("case", "batch", 0, "a whole number from 1 on, got 0"),
        ("case", "batch", True, "a whole number from 1 on, got True"),
        ("shape", "height", -1, "a whole number from 0 on, got -1"),
        ("shape", "groups", 0, "a whole number from 1 on, got 0"),
        ("timing", "median_ms", "1", "a positive finite number, got '1'"),
        ("timing", "median_ms", None, "a positive finite number, got None"),
        ("timing", "median_ms", 0, "a positive finite number, got 0"),
        ("timing", "q80_ms", float("inf"), "a positive finite number, got inf"),
        ("record", "host_us", float("nan"), "a positive finite number, got nan"),
    ],
)
def test_a_value_that_no_run_writes_is_named_with_its_file(part, name, value, allowed, tmp_path, capsys):
    data = json.loads(small(batches=(8,)).to_json())
    record = data["records"][0]
    parts = {"record": record, **record, "shape": record["case"]["shape"]}
    parts[part][name] = value
    path = tmp_path / "some.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert cli.main(["plot", str(path)]) == 2
    assert capsys.readouterr().err == f"sk-triton plot: {path}: {name} must be {allowed}\n"


def test_a_suite_without_pictures_is_named_with_its_file(saved, capsys):
    path = saved("latency.json", dataclasses.replace(small(), suite="latency"))
    assert cli.main(["plot", path]) == 2
    assert re.search(r"latency.json: suite must be one of layer, .*'latency'", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments", [[], ["some.json", "--readme", "README.md"], ["--readme", "README.md", "--csv"]]
)
def test_bad_usage_of_plot_is_refused(arguments, capsys):
    assert cli.main(["plot", *arguments]) == 2
    assert "sk-triton plot:" in capsys.readouterr().err


def evidence(*runs):
    return [
        readme.Evidence(
            f"bench/results/{run.stamp.device_type}/{run.suite}-{run.stamp.device_type}.json", run
        )
        for run in runs
    ]


def test_the_readme_shows_gpu_results_where_there_are_any():
    both = evidence(*(slowed(run, 30, lambda record: record.ours) for run in (small("cpu"), small())))
    for section in ("plots", "results", "losses"):
        assert "EPYC" not in readme.render(section, both)
        assert "EPYC" in readme.render(section, both[:1])


def test_the_readme_lists_the_cases_that_are_lost():
    lost = slowed(small(), 30, lambda record: record.ours and record.case.batch == 8)
    text, ungraphed = readme.render("losses", evidence(lost)).split("\n\nOn ")
    assert "we lose in 2 of 4 cases of suite layer:" in text
    assert text.count("\n- ") == 2
    assert text.count(" batch 8 ") == 2
    assert "out of a CUDA graph and peers in one, we lose in 4 of 4 cases of suite layer:" in ungraphed


def test_the_readme_has_no_list_of_losses_where_nothing_is_lost():
    assert readme.render("losses", evidence(small("cpu"))) == "None.\n"


def test_the_readme_shows_one_dtype_and_links_the_data():
    items = evidence(small(dtypes=("fp32", "fp16")))
    links = re.findall(r"\((\S+)\.png\)", readme.render("plots", items))
    assert links
    *shown, passes = links
    assert all(link.endswith("fp16") for link in shown)
    assert passes.endswith("-passes")
    assert "(bench/results/cuda/layer-cuda.json)" in readme.render("results", items)
    assert markdown.markdown_table(items[0].run).strip() in readme.render("results", items)


def two_runs(old_batches=(8, 32), new_batches=(8,), **changes):
    """An older run, whose sk_triton is slow, and a newer one, each with a note."""
    old, new = (
        readme.Evidence(
            f"bench/results/cuda/{name}.json",
            small(
                batches=batches,
                stamp=a_stamp(date=f"2026-11-0{day}T00:00:00+00:00", git_commit=name * 40),
                notes=(f"{results.TIME_LIMIT}: 1 cases left unmeasured", f"note of {name}"),
            ),
        )
        for name, day, batches in (("a", 1, old_batches), ("b", 2, new_batches))
    )
    run = slowed(old.run, 30, lambda record: record.ours)
    return dataclasses.replace(
        old, run=dataclasses.replace(run, stamp=dataclasses.replace(run.stamp, **changes))
    ), new


def test_the_readme_shows_the_newest_of_each_case_of_a_suite():
    old, new = two_runs()
    plots, table = (readme.render(section, [old, new]) for section in ("plots", "results"))
    assert "/layer-speed" in plots
    assert "/a-speed" not in plots
    assert 0 < table.index("/b.json") < table.index("/a.json")
    joined = joining.join([old.run, new.run])
    assert joined.stamp == new.run.stamp
    assert joined.notes == ("note of b", "aaaaaaaaa: note of a")
    for case, records in results.by_case(joined.records).items():
        commits = {record.commit for record in records if record.ours}
        assert commits == {None if case.batch == 8 else "aaaaaaaaa"}
    rows = [line for line in table.splitlines() if line.startswith("| layer")]
    assert len(rows) == 4
    assert all(("; at aaaaaaaaa)" in row.split(" | ")[1]) == ("batch 32" in row) for row in rows)


def test_a_peer_counts_with_its_fastest_committed_time():
    """sk_triton's time is the newest, the peers' are the fastest, form by form, whichever run is the newer."""
    old, new = two_runs()
    run = slowed(old.run, 0.5, lambda record: record.role == results.PEER)
    for joined in (joining.join([run, new.run]), joining.join([new.run, run])):
        for case, records in results.by_case(joined.records).items():
            if case.batch != 8:
                continue
            newest = {r.key: r for r in new.run.records if r.case == case}
            oldest = {r.key: r for r in run.records if r.case == case}
            for record in records:
                is_peer = record.role == results.PEER
                assert record.timing == (oldest if is_peer else newest)[record.key].timing
                assert record.commit == ("aaaaaaaaa" if is_peer else None)
    without = dataclasses.replace(new.run, records=tuple(r for r in new.run.records if r.source != "timm"))
    joined = joining.join([run, without])
    assert {r.commit for r in joined.records if r.source == "timm"} == {"aaaaaaaaa"}
    slower = joining.join([slowed(old.run, 2, lambda record: record.role == results.PEER), new.run])
    assert {record.commit for record in slower.records if record.case.batch == 8} == {None}


def test_under_another_torch_a_peer_is_another():
    old, new = two_runs(torch="2.14.0")
    run = slowed(old.run, 0.5, lambda record: record.role == results.PEER)
    joined = joining.join([run, new.run])
    assert {record.commit for record in joined.records if record.case.batch == 8} == {None}
    assert any("other" in note and "torch" in note for note in joined.notes)


def test_the_readme_names_what_was_not_measured_of_the_peers():
    run = small()
    bare = dataclasses.replace(
        run, records=tuple(r for r in run.records if not r.form.startswith("graph-compile"))
    )
    full, part = (readme.render("results", evidence(each)) for each in (run, bare))
    assert "fastest measured peer" in full
    assert "CUDA graph + torch.compile" not in full
    assert "Not measured of the peers' default forms: CUDA graph + torch.compile" in part


@pytest.mark.parametrize(
    "text",
    ["<!-- generated: plots -->\n", "<!-- generated: plots -->\n<!-- generated: losses -->\n<!-- end -->\n"],
)
def test_an_open_part_of_the_readme_is_refused(text):
    with pytest.raises(ValueError, match="must have an"):
        readme.fill(text, evidence(small()))


def test_a_readme_without_parts_is_refused(saved, tmp_path, capsys):
    saved("bench/results/h100/layer-cuda.json", small(batches=(8,)))
    path = tmp_path / "README.md"
    assert cli.main(["plot", "--readme", str(path)]) == 2
    assert f"--readme must be a file with generated parts, got {path}" in capsys.readouterr().err
    path.write_text("nothing is generated here\n", encoding="utf-8")
    assert cli.main(["plot", "--readme", str(path)]) == 2
    assert "must have a part after <!-- generated: NAME -->, found none" in capsys.readouterr().err


def test_an_unknown_part_of_the_readme_is_refused():
    with pytest.raises(ValueError, match="one of plots, units, results, losses, peers, got 'plot'"):
        readme.fill("<!-- generated: plot -->\n<!-- end -->", evidence(small()))
    with pytest.raises(ValueError, match="must hold a results file"):
        readme.render("plots", [])


def test_plot_fills_the_readme_and_draws_what_it_links(saved, tmp_path, capsys):
    saved("bench/results/h100/layer-cuda.json", small(batches=(8,)))
    saved("bench/results/cpu/layer-cpu.json", small("cpu", batches=(8,)))
    path = tmp_path / "README.md"
    text = "".join(
        f"before {name}\n<!-- generated: {name} -->\nold\n<!-- end -->\n" for name in readme.SECTIONS
    )
    path.write_text(text + "after\n", encoding="utf-8")
    assert cli.main(["plot", "--readme", str(path)]) == 0
    filled = path.read_text(encoding="utf-8")
    assert "old" not in filled
    assert filled.endswith("after\n")
    assert all(f"before {name}\n<!-- generated: {name} -->\n" in filled for name in readme.SECTIONS)
    links = linked_pictures(filled)
    assert links
    assert all((tmp_path / link).is_file() for link in links)
    assert readme.fill(filled, readme.load_evidence(tmp_path)) == filled


def test_results_with_an_objection_give_the_readme_nothing(saved, tmp_path, capsys):
    name = saved("bench/results/h100/layer-cuda.json", small(batches=(8,), objections=("a reason",)))
    path = tmp_path / "README.md"
    path.write_text("<!-- generated: losses -->\nold\n<!-- end -->\n", encoding="utf-8")
    assert cli.main(["plot", "--readme", str(path)]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "a reason" in error
    assert "old" in path.read_text(encoding="utf-8")


def linked_pictures(text):
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)


def test_the_readme_agrees_with_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- generated: plots -->" in text
    assert readme.fill(text, readme.load_evidence(ROOT), readme.load_units(ROOT)) == text
    links = linked_pictures(text)
    assert links
    assert all((ROOT / link).is_file() for link in links)


def test_files_of_a_report_that_hold_no_results_are_passed_over(saved, tmp_path):
    saved("bench/results/h100/layer-cuda.json", small(batches=(8,)))
    for name in readme.NO_SUITES:
        (tmp_path / "bench/results/h100" / name).write_text("{}", encoding="utf-8")
    assert [item.name for item in readme.load_evidence(tmp_path)] == ["layer-cuda"]


def test_a_case_that_the_newest_run_broke_off_is_the_older_runs():
    old, new = (
        small(
            batches=(8, 32),
            stamp=a_stamp(date=f"2026-11-0{day}T00:00:00+00:00", git_commit=name * 40),
        )
        for name, day in (("a", 1), ("b", 2))
    )
    first = new.records[0].case
    broken = dataclasses.replace(
        new,
        records=tuple(
            dataclasses.replace(record, timing=None, status=results.NOT_MEASURED)
            if record.case == first
            else record
            for record in new.records
        ),
        interrupted=True,
        ceilings=results.Ceilings(1.0, {"bf16": 2.0}),
    )
    joined = joining.join([broken, old])
    by_case = results.by_case(joined.records)
    commits = {case: {record.commit for record in records} for case, records in by_case.items()}
    assert commits[first] == {"aaaaaaaaa"}
    assert len(by_case[first]) == len(results.by_case(old.records)[first])
    others = [case for case in by_case if case != first]
    assert others
    assert all(by_case[case] == results.by_case(new.records)[case] for case in others)
    assert joined.ceilings.copy_bytes_per_s == 1.0
    assert {*joined.ceilings.matrix_flop_per_s} >= {"bf16", "fp16"}
    assert not joined.interrupted
    with pytest.raises(ValueError, match="one suite on one device"):
        joining.join([old, dataclasses.replace(new, suite="train")])


def test_a_readme_without_a_suite_to_compare_says_so():
    host = evidence(some_results("host", batches=(1,), stages=(1,)))
    assert "Not measured." in readme.render("peers", host)
