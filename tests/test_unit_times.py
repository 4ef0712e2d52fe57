"""Units measured launch by launch: what is read, drawn and put into the README."""

import pytest

from sk_triton.bench import readme, unit_times
from sk_triton.bench.plots import units
from sk_triton.bench.shapes import CLASSIC, PAPER

from .drawn_pictures import words
from .synthetic_results import some_results

HEADER = "commit,unit,shape,batch,dtype,direction,schedule,kernels,sum_microseconds,span_microseconds\n"
ROWS = """\
aaa,paper,128@56x56,128,fp16,inference,store,3,600,610
aaa,paper,128@56x56,128,fp16,inference,recompute,3,400,410
aaa,paper,128@56x56,128,fp16,inference,eager,24,1200,1300
aaa,classic,256@28x28,128,fp16,inference,merged,3,150,160
aaa,paper,128@56x56,128,fp16,training,"train, branches saved",90,1500,3000
aaa,paper,128@56x56,128,fp16,training,eager,69,4500,4600
bbb,paper,128@56x56,128,fp16,inference,recompute,3,200,210
"""


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "bench" / "results" / "h100"
    folder.mkdir(parents=True)
    (folder / unit_times.NAME).write_text(HEADER + ROWS, encoding="utf-8")
    return folder / unit_times.NAME


def test_the_newest_time_of_each_schedule_counts(path):
    times = unit_times.load(path)
    assert len(times) == 6
    by_case = unit_times.by_case(times)
    paper = next(schedules for case, schedules in by_case.items() if case.subject == PAPER)
    ours = unit_times.fastest_schedule(paper)
    assert (ours.commit, ours.schedule) == ("bbb", "recompute")
    assert ours.seconds == pytest.approx(200e-6)
    # Two passes over 128 x 128 x 56 x 56 elements of 2 bytes at 3.0 TB/s.
    assert ours.floor_seconds == pytest.approx(2 * 128 * 128 * 56 * 56 * 2 / 3.0e12)
    assert [case.shape.kernels for case in by_case if case.subject == CLASSIC] == [(3, 5)]


def test_the_table_compares_what_eager_was_measured_in(path):
    rows = unit_times.markdown(unit_times.load(path)).splitlines()[2:]
    assert rows == [
        "| paper 128@56², inference | **200 µs** | recompute | 1200 µs | 6.0x | 34% |",
        "| paper 128@56², training | **1500 µs** | train, branches saved | 4500 µs | 3.0x |  |",
        "",
        "Eager was timed at aaa, sk_triton at bbb: in other runs, perhaps on other cards of the model.",
    ]


def test_the_picture_shows_times_and_the_floor(path):
    figure = units.draw(unit_times.load(path))
    assert "Eager was timed at aaa, sk_triton at bbb" in words(figure)
    (ax,) = figure.axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([1200, 200])
    assert any("6.0x" in text.get_text() for text in ax.texts)
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([2 * 128 * 128 * 56 * 56 * 2 / 3.0e6])


def test_other_units_are_refused(path):
    path.write_text(HEADER + ROWS.replace("classic", "dense"), encoding="utf-8")
    with pytest.raises(ValueError, match="unit must be one of classic, paper, got 'dense'"):
        unit_times.load(path)


def test_the_readme_links_their_picture_behind_the_suites(path, tmp_path):
    (file,) = readme.load_units(tmp_path)
    assert file.picture == "bench/results/h100/units-inference.png"
    on_cpu, on_gpu = (
        readme.render("plots", [readme.Evidence(f"bench/results/{device}/layer.json", run)], [file])
        for device in ("cpu", "cuda")
        for run in [some_results(device_type=device, stages=(1,), batches=(8,))]
    )
    for text in (on_cpu, on_gpu):
        assert text.startswith("![layer on")
        assert "![H100 SXM: units, inference](bench/results/h100/units-inference.png)" in text
    cpu = [
        readme.Evidence(
            "bench/results/cpu/layer.json", some_results(device_type="cpu", stages=(1,), batches=(8,))
        )
    ]
    assert "| paper 128@56², inference | **200 µs**" in readme.render("units", cpu, [file])
    assert readme.render("units", cpu) == "Not measured.\n"
