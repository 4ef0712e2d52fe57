"""The benchmark: who competes, on what, and the command as a whole."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from sk_triton import cli
from sk_triton.bench import inputs, protocol, providers, results, suite
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("unit", list(providers.UNITS))
def test_every_gpu_provider_is_right_and_timed(unit):
    device, records = torch.device("cuda"), []
    competitors = {unit: providers.providers(unit, "cuda", quick=False)}
    run_setting = suite.Setting(device, 0, competitors, protocol.timer_for(device), SHORT)
    suite.run_case(small_case(unit=unit, dtype="fp16"), run_setting, records)

    assert {record.label: (record.status, record.message) for record in records} == {
        record.label: (results.OK, None) for record in records
    }


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
