"""The benchmark: what is measured, how it is judged and timed, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from torch import nn

from sk_triton import cli
from sk_triton.bench import inputs, plots, protocol, providers, results, suite, table
from sk_triton.bench.peers import PaperUnit, SeedSKConv
from sk_triton.bench.shapes import STAGES, Stage, default_grid

CPU = torch.device("cpu")
SMALL = Stage(1, 64, 9, 7)
SHORT = protocol.Budget(warmup_seconds=0, seconds=0, min_rounds=3, max_rounds=3)


@pytest.fixture
def hide_package(monkeypatch):
    """Makes a package look as if it were not installed."""
    find_spec = importlib.util.find_spec

    def hide(hidden):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == hidden else find_spec(name)
        )

    return hide


class FakeTimer:
    """A clock that only a call moves: `machine_slowness` multiplies the cost of work at a given time."""

    def __init__(self, machine_slowness=lambda seconds: 1.0):
        self.seconds = 0.0
        self.machine_slowness = machine_slowness

    def work(self, ms: float) -> None:
        self.seconds += ms / 1e3 * self.machine_slowness(self.seconds)

    def now(self) -> float:
        return self.seconds

    def sample(self, call) -> float:
        start = self.seconds
        call()
        return (self.seconds - start) * 1e3


# --- timing


def test_providers_take_turns_and_rotate_who_goes_first():
    timer, order = FakeTimer(), []

    def call(name):
        return lambda: (order.append(name), timer.work(1))

    measured = protocol.Measurement()
    budget = protocol.Budget(warmup_seconds=0, seconds=0, min_rounds=4, max_rounds=4)
    protocol.measure({name: call(name) for name in "abc"}, timer, budget, measured)

    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_machine_that_slows_down_does_not_favour_anyone():
    timer = FakeTimer(machine_slowness=lambda seconds: 1 + 20 * seconds)
    measured = protocol.Measurement()
    budget = protocol.Budget(warmup_seconds=0, seconds=1, min_rounds=5, max_rounds=100)
    protocol.measure({"a": lambda: timer.work(2), "b": lambda: timer.work(1)}, timer, budget, measured)

    ratio = measured.timing("a").median_ms / measured.timing("b").median_ms
    assert ratio == pytest.approx(2, rel=0.05)


def test_rounds_end_with_the_budget_but_not_before_the_least_number():
    def rounds(call_ms, **budget):
        timer, measured = FakeTimer(), protocol.Measurement()
        limits = protocol.Budget(**{"warmup_seconds": 0, "max_rounds": 1000, **budget})
        protocol.measure({"a": lambda: timer.work(call_ms)}, timer, limits, measured)
        return len(measured.samples["a"])

    assert rounds(125, seconds=1, min_rounds=3) == 8
    assert rounds(1000, seconds=1, min_rounds=3) == 3
    assert rounds(1, seconds=1, min_rounds=3, max_rounds=10) == 10


def test_warm_up_lasts_its_time_and_is_not_counted():
    timer, measured, calls = FakeTimer(), protocol.Measurement(), []
    budget = protocol.Budget(warmup_seconds=0.5, seconds=0, min_rounds=2, max_rounds=2)
    protocol.measure({"a": lambda: (calls.append(1), timer.work(125))}, timer, budget, measured)

    assert len(calls) == 4 + 2
    assert len(measured.samples["a"]) == 2


def test_progress_only_grows_and_ends_at_one():
    timer, seen = FakeTimer(), []
    budget = protocol.Budget(warmup_seconds=0, seconds=0.1, min_rounds=3, max_rounds=50)
    protocol.measure({"a": lambda: timer.work(7)}, timer, budget, protocol.Measurement(), seen.append)

    assert seen == sorted(seen)
    assert 0 < seen[0] < 1
    assert seen[-1] == 1


def test_summary_is_the_median_with_its_quantiles():
    assert protocol.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == results.Timing(3.5, 2.0, 5.0, 6)
    assert protocol.summarise([7.0]) == results.Timing(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), results.OUT_OF_MEMORY),
        (MemoryError(), results.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), results.OUT_OF_MEMORY),
        (RuntimeError("first line\nsecond line"), results.FAILED),
    ],
)
def test_a_provider_that_fails_half_way_is_recorded_and_the_others_go_on(error, status):
    timer, measured, done = FakeTimer(), protocol.Measurement(), []

    def failing():
        done.append(1)
        if len(done) == 3:
            raise error
        timer.work(1)

    budget = protocol.Budget(warmup_seconds=0, seconds=0, min_rounds=5, max_rounds=5)
    protocol.measure({"bad": failing, "good": lambda: timer.work(1)}, timer, budget, measured)

    assert measured.failures["bad"][0] == status
    assert "\n" not in measured.failures["bad"][1]
    assert measured.timing("bad") is None
    assert measured.timing("good").samples == 5


# --- correctness


def test_error_rule_is_twice_eagers_own_error():
    reference = torch.full((2, 3), 8.0, dtype=torch.float64)
    assert protocol.check("random", reference + 0.02, reference, 0.01, torch.float32).passed
    assert not protocol.check("random", reference + 0.021, reference, 0.01, torch.float32).passed
    step = torch.finfo(torch.float16).eps * 8
    assert protocol.check("random", reference, reference, 0.0, torch.float16).allowed == step


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails_the_check(bad):
    reference = torch.zeros(20, 3, dtype=torch.float64)
    y = reference.clone()
    y[13, 1] = bad
    judged = protocol.check("random", y, reference, 1.0, torch.float32)
    assert (judged.passed, judged.error) == (False, None)


def test_an_output_of_another_shape_fails_the_check():
    judged = protocol.check("random", torch.zeros(2, 4), torch.zeros(2, 3), 1.0, torch.float32)
    assert not judged.passed


class FakeSource(providers.Source):
    """A plain paper unit under another name."""

    key = "fake"
    label = "fake"

    def __init__(self, key="fake"):
        self.key = self.label = key

    def module(self, stage):
        return PaperUnit(stage.channels, 2, 32, 16)


class SwappedBranches(FakeSource):
    def bind(self, forward):
        forward.paths = nn.ModuleList(reversed(list(forward.paths)))
        return forward


class HalfAnAnswer(FakeSource):
    def bind(self, forward):
        return lambda x: forward(x) * (1 + 1e-4)


class Raising(FakeSource):
    def __init__(self, error, on_call):
        super().__init__("raising")
        self.error, self.on_call, self.calls = error, on_call, 0

    def bind(self, forward):
        def call(x):
            self.calls += 1
            if self.calls == self.on_call:
                raise self.error
            return forward(x)

        return call


class BreaksWhenBuilt(FakeSource):
    def module(self, stage):
        raise TypeError("no such argument")


def small_case(batch=2, unit=providers.PAPER, dtype="fp32"):
    return suite.Case(providers.UNITS[unit], SMALL, batch, dtype)


def setting(*sources):
    competitors = [providers.Provider(source, providers.Eager()) for source in sources]
    return suite.Setting(CPU, 0, dict.fromkeys(providers.UNITS, competitors), protocol.CpuTimer(), SHORT)


def run_small(*sources, **options):
    records = []
    suite.run_case(small_case(**options), setting(*sources), records)
    return {record.source: record for record in records}


@pytest.mark.parametrize("wrong", [SwappedBranches("wrong"), HalfAnAnswer("wrong")])
def test_a_wrong_provider_is_caught_and_never_timed(wrong):
    records = run_small(FakeSource("right"), wrong)

    assert records["right"].status == results.OK
    assert records["right"].timing.samples == 3
    assert [check.input for check in records["right"].checks] == list(inputs.KINDS)
    assert records["wrong"].status == results.WRONG
    assert records["wrong"].timing is None
    assert "allowed" in records["wrong"].message
    run = results.Results("layer", 0, results.stamp(CPU), tuple(records.values()))
    assert (run.sound, run.exit_code) == (False, 1)


def test_a_failing_provider_and_one_out_of_memory_are_recorded_and_the_others_go_on():
    records = run_small(
        Raising(torch.OutOfMemoryError("no room"), on_call=1), BreaksWhenBuilt("broken"), FakeSource("right")
    )
    assert records["raising"].status == results.OUT_OF_MEMORY
    assert records["broken"].status == results.FAILED
    assert "no such argument" in records["broken"].message
    assert records["right"].status == results.OK


def test_interrupting_a_case_keeps_what_was_measured():
    # Two checks and one warm-up call come first; the fifth call is the second timed one.
    records = []
    with pytest.raises(KeyboardInterrupt):
        suite.run_case(
            small_case(),
            setting(FakeSource("right"), Raising(KeyboardInterrupt(), on_call=5)),
            records,
        )
    assert [record.status for record in records] == [results.OK, results.OK]
    assert records[1].timing.samples == 1


def test_interrupting_the_checks_leaves_the_case_marked_as_not_measured():
    records = []
    with pytest.raises(KeyboardInterrupt):
        suite.run_case(small_case(), setting(Raising(KeyboardInterrupt(), on_call=1)), records)
    assert [record.status for record in records] == [results.NOT_MEASURED]


def test_an_input_that_cannot_be_made_fails_the_case_for_everyone(monkeypatch):
    monkeypatch.setattr(inputs, "make_input", lambda *a: (_ for _ in ()).throw(MemoryError("too large")))
    assert run_small(FakeSource("right"))["right"].status == results.OUT_OF_MEMORY


# --- providers, shapes and inputs


@pytest.mark.parametrize("unit", list(providers.UNITS))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_cpu_provider_computes_the_same_function(unit, dtype):
    records = []
    competitors = {unit: providers.providers(unit, "cpu", quick=False)}
    run_setting = suite.Setting(CPU, 3, competitors, protocol.CpuTimer(), SHORT)
    suite.run_case(small_case(unit=unit, dtype=dtype), run_setting, records)

    assert {record.label: (record.status, record.message) for record in records} == {
        record.label: (results.OK, None) for record in records
    }
    assert len(records) == {"seed": 4, "paper": 6}[unit]


def test_the_reference_is_labelled_as_such_on_the_cpu():
    ours = [provider for provider in providers.providers("seed", "cpu", quick=True) if provider.source.ours]
    assert {provider.source.label for provider in ours} == {"sk_triton (CPU reference path)"}


def test_a_gpu_adds_triton_and_compiled_peers_and_only_triton_is_ours():
    for quick in (True, False):
        chosen = providers.providers("paper", "cuda", quick)
        assert {p.source.key for p in chosen if p.source.ours} == {"ours-triton"}
        assert any(isinstance(p.form, providers.Compiled) for p in chosen)
        assert len({p.key for p in chosen}) == len(chosen)


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


def test_no_weight_of_a_case_is_at_its_initial_value():
    for unit in providers.UNITS.values():
        state = providers.make_state(unit, SMALL, seed=0)
        assert all(value.float().std() > 0 for value in state.values() if value.numel() > 1)
        again = providers.make_state(unit, SMALL, seed=0)
        assert all(torch.equal(state[name], again[name]) for name in state)


def test_peers_are_the_documents_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    seed = SeedSKConv(8, M=3, G=2, r=2, L=4).double()
    us = torch.stack([conv(x) for conv in seed.convs])
    z = seed.fc(us.sum(0).mean((2, 3)))
    a = torch.stack([fc(z) for fc in seed.fcs]).softmax(0)
    torch.testing.assert_close(seed(x), (us * a[..., None, None]).sum(0))
    assert [tuple(conv.kernel_size) for conv in seed.convs] == [(3, 3), (5, 5), (7, 7)]

    paper = PaperUnit(8, M=3, G=2, r=2, L=4).double().eval()
    us = torch.stack([path(x) for path in paper.paths])
    a = paper.attn(us.sum(0).mean((2, 3))).transpose(0, 1)
    torch.testing.assert_close(paper(x), (us * a[..., None, None]).sum(0))
    assert [path.conv.dilation[0] for path in paper.paths] == [1, 2, 3]


def test_the_stages_are_those_of_sknet50():
    assert [stage.name for stage in STAGES.values()] == ["128@56²", "256@28²", "512@14²", "1024@7²"]
    assert default_grid("cpu", quick=True).batches == (1, 8)
    assert default_grid("cuda", quick=False).batches == (1, 8, 32, 128)
    assert default_grid("cuda", quick=True).dtypes == ("fp16",)


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_inputs_are_repeatable_and_every_sample_is_another(kind):
    def make(seed):
        return inputs.make_input(kind, 5, SMALL, torch.float16, CPU, seed)

    x = make(1)
    assert (x.shape, x.dtype) == ((5, 64, 9, 7), torch.float16)
    assert torch.equal(x, make(1))
    assert not torch.equal(x, make(2))
    assert torch.unique(x.flatten(1), dim=0).shape[0] == 5


def test_photograph_activations_are_those_of_a_photograph():
    x = inputs.make_input(inputs.PHOTO, 2, STAGES[2], torch.float32, CPU, 0)
    noise = torch.relu(inputs.make_input(inputs.RANDOM, 2, STAGES[2], torch.float32, CPU, 0))

    def neighbour_correlation(x):
        left, right = x[..., :-1] - x.mean((2, 3), keepdim=True), x[..., 1:] - x.mean((2, 3), keepdim=True)
        return ((left * right).mean() / x.var()).item()

    assert x.min() == 0
    assert x.std().item() == pytest.approx(1, rel=1e-3)
    assert neighbour_correlation(x) > 0.25
    assert abs(neighbour_correlation(noise)) < 0.05


def test_an_unknown_input_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'sound'"):
        inputs.make_input("sound", 1, SMALL, torch.float32, CPU, 0)


# --- results, table and plot


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


# --- the command


def bench(tmp_path, *options) -> tuple[int, results.Results]:
    arguments = ["bench", "--quick", "--device", "cpu", "--stages", "4", "--batch", "1"]
    code = cli.main([*arguments, "--output", str(tmp_path / "out"), *options])
    return code, results.load(tmp_path / "out" / "layer-cpu.json")


@pytest.fixture
def hurried(monkeypatch):
    """Three rounds per case."""
    monkeypatch.setattr(protocol, "Budget", lambda **options: SHORT)


@pytest.mark.usefixtures("hurried")
def test_the_whole_command_on_the_cpu(tmp_path, capsys):
    code, run = bench(tmp_path)
    out = capsys.readouterr().out

    assert code == 0
    assert {record.status for record in run.records} == {results.OK}
    assert {record.source for record in run.records} == {"seed", "timm", "ours-reference"}
    assert {record.case for record in run.records} == {("seed", "fp32", 4, 1), ("paper", "fp32", 4, 1)}
    assert (tmp_path / "out" / "layer-cpu-fp32.png").stat().st_size > 20_000
    assert "layer-cpu.json" in out
    assert "layer-cpu-fp32.png" in out


def test_without_timm_its_provider_is_skipped_with_the_line_that_mends_it(hide_package):
    hide_package("timm")
    records = run_small(providers.TimmSelectiveKernel(), FakeSource("right"))

    assert records["timm"].status == results.SKIPPED
    assert "pip install" in records["timm"].message
    assert records["right"].status == results.OK
    run = results.Results("layer", 0, results.stamp(CPU), tuple(records.values()))
    assert run.exit_code == 0
    assert "pip install" in printed(run)


@pytest.mark.usefixtures("hurried")
def test_a_wrong_provider_makes_the_command_fail(tmp_path, monkeypatch):
    chosen = [providers.Provider(SwappedBranches("wrong"), providers.Eager())]
    monkeypatch.setattr(providers, "UNITS", {"paper": providers.UNITS["paper"]})
    monkeypatch.setattr(suite, "UNITS", providers.UNITS)
    monkeypatch.setattr(providers, "providers", lambda *a: chosen)
    code, run = bench(tmp_path)
    assert code == 1
    assert [record.status for record in run.records] == [results.WRONG]


@pytest.mark.usefixtures("hurried")
def test_ctrl_c_saves_what_was_measured(tmp_path, monkeypatch, capsys):
    run_case, finished = suite.run_case, []

    def interrupted(case, *arguments):
        if finished:
            raise KeyboardInterrupt
        finished.append(case)
        run_case(case, *arguments)

    monkeypatch.setattr(suite, "run_case", interrupted)
    code, run = bench(tmp_path)

    assert code == 130
    assert run.interrupted
    assert {record.unit for record in run.records} == {"seed"}
    assert {record.status for record in run.records} == {results.OK}
    assert "interrupted" in capsys.readouterr().out
    assert (tmp_path / "out" / "layer-cpu-fp32.png").is_file()


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn"])
def test_a_missing_package_is_one_line_with_its_remedy(package, tmp_path, capsys, hide_package):
    hide_package(package)
    assert cli.main(["bench", "--quick", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "pip install" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "banana"])
def test_a_device_that_is_not_there_is_refused(device, tmp_path, capsys):
    assert cli.main(["bench", "--quick", "--device", device, "--output", str(tmp_path)]) == 2
    assert device in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--batch", "0"], ["--dtype", "fp8"], ["--stages", "5"]])
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["bench", *options])
    assert refusal.value.code == 2
    assert options[0] in capsys.readouterr().err
