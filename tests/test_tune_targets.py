"""What there is to tune about a unit, and how a device tries it: right results first, then time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sk_triton.bench.compiled.processes import compiling_processes
from sk_triton.bench.compiled.training_steps import step
from sk_triton.bench.grid import classic_unit, paper_unit
from sk_triton.bench.measuring import protocol
from sk_triton.bench.model.gpus import find_gpu
from sk_triton.bench.shapes import SKNET50, SKRESNEXT50, STAGES
from sk_triton.bench.tuning import subjects
from sk_triton.bench.tuning.machine import Device
from sk_triton.bench.tuning.targets import _steps_on_meta, assess, targets_of
from sk_triton.bench.tuning.units import network_problems, title
from sk_triton.chips import CHIPS
from sk_triton.kernels.config import GateConfig, GradWideConfig
from sk_triton.tuning.entries import dump_config
from sk_triton.tuning.keys import KINDS, SCHEDULE, TRAINING
from sk_triton.workload import Workload

from .bench_fakes import CPU, SHORT
from .tuned import workload
from .versions import HAS_NARROW_PRODUCTS, needs_narrow_products


def kinds(targets) -> list[str]:
    return [target.kind for target in targets]


@needs_narrow_products
def test_every_launch_of_every_schedule_once_then_the_schedule():
    found = targets_of("a unit", workload(), 3)
    assert kinds(found) == [
        "branch_pool", "branch_select", "gate", "branch_store", "select", "gated_select", "pooled_sums", SCHEDULE,
    ]  # fmt: skip
    schedules = 3 * ["recompute"] + 2 * ["store"] + ["gated", "library", "recompute"]
    assert [target.schedule for target in found] == schedules
    assert len({target.key for target in found}) == len(found)
    assert all(len(target.choices) <= 3 for target in found[:-1])
    linear = targets_of("a unit", workload(spec=classic_unit(128)), 3)
    assert {"border_sums", "merged_conv"} <= set(kinds(linear))
    assert linear[-1].choices[0] == "merged"
    training = targets_of("a unit", workload(), 3, TRAINING)
    assert kinds(training) == ["select", "branch_train", "reduction", "branch_grad"]
    assert {target.schedule for target in training} == {"train"}
    assert {kind for found in (found, linear, training) for kind in kinds(found)} == set(KINDS)


def test_gradients_that_the_library_computes_are_not_tuned():
    strided = replace(paper_unit(128), stride=2)
    found = targets_of("a unit", workload(spec=strided), 3, TRAINING)
    assert kinds(found) == ["select", "branch_train", "reduction"]


@needs_narrow_products
def test_a_training_step_is_tuned_with_the_launches_that_inference_has_too():
    linear = targets_of("a unit", workload(spec=classic_unit(128)), 3, TRAINING)
    assert kinds(linear) == ["branch_store", "select", "reduction", "branch_grad"]
    for target in linear[:2]:
        (own,) = target.steps(_steps_on_meta(target, target.choices[1], {}))
        assert own.kernel.fn.__name__.endswith("_fwd_kernel")
        assert own.constexprs.get("TASK", "store") == "store"


@needs_narrow_products
def test_launches_that_share_a_config_are_tuned_together():
    found = {t.kind: t for t in targets_of("a unit", replace(SMALL, n=2), 2, TRAINING)}
    for kind, kernels in {
        "branch_train": ["branch_conv_window_fwd" if HAS_NARROW_PRODUCTS else "branch_conv_stream_fwd"],
        "reduction": ["pooled_moments_fwd", "select_bwd"],
        "branch_grad": ["branch_grad_stream", "branch_grad_reduce", "branch_grad_reduce"],
    }.items():
        target = found[kind]
        steps = target.steps(_steps_on_meta(target, target.choices[1], {}))
        wide = ["branch_grad_data", "branch_grad_weight", "branch_grad_weight", *kernels[1:]]
        is_wide = isinstance(target.choices[1], GradWideConfig)
        assert [step.kernel.fn.__name__.removesuffix("_kernel") for step in steps] == (
            wide if is_wide else kernels
        )


def test_dense_units_start_from_the_librarys_convolution():
    targets = targets_of("a unit", workload(4, spec=paper_unit(256, groups=1), size=7), 3)
    pool, schedule = next(t for t in targets if t.kind == "pooled_sums"), targets[-1]
    assert (pool.kind, pool.schedule, len(pool.choices)) == ("pooled_sums", "library", 3)
    assert schedule.choices == ("library", "store", "gated")
    for choice in pool.choices:
        assert pool.plan(choice, {}).reduction == choice


def test_launches_of_one_kind_are_told_apart():
    mixed = replace(paper_unit(64), branches=(paper_unit(64, 32).branches[0], paper_unit(64, 16).branches[1]))
    stores = [t for t in targets_of("a unit", workload(4, spec=mixed, size=7), 2) if t.kind == "branch_store"]
    assert [target.occurrence for target in stores] == [0, 1]
    for target in stores:
        plan = target.plan(target.choices[1], {})
        assert plan.branch_launches[target.occurrence].config == target.choices[1]
        assert plan.branch_launches[1 - target.occurrence].config != target.choices[1]


def test_a_network_has_its_stages_and_the_strided_units_before_them():
    problems = network_problems(SKNET50, 32, torch.float16, False)
    assert [(p.spec.in_channels, p.height, p.spec.stride) for p in problems] == [
        (512, 14, 1), (128, 56, 1), (256, 28, 1), (1024, 7, 1), (256, 56, 2), (512, 28, 2), (1024, 14, 2),
    ]  # fmt: skip
    plain = {(p.spec.in_channels, p.height) for p in problems if p.spec.stride == 1}
    assert plain == set(STAGES.values())
    assert problems[0].spec == paper_unit(512)
    assert {problem.n for problem in problems} == {32}
    assert title(problems[4]) == "256@56x56, stride 2, batch 32, fp16"
    pytest.importorskip("timm")
    assert len(network_problems(SKRESNEXT50, 1, torch.float32, True)) == 7
    with pytest.raises(ValueError, match="model must be one of sknet50"):
        network_problems("resnet50", 1, torch.float16, False)


@pytest.mark.compile
def test_candidates_are_compiled_and_predicted_and_what_spills_is_out():
    gpu = find_gpu("h100")
    target = next(
        t for t in targets_of("a unit", workload(8, spec=paper_unit(64), size=7), 2) if t.kind == "gate"
    )
    # No GPU holds products of so many entries in the registers of one warp; more would only take longer to compile.
    greedy = GateConfig(BLOCK_N=64, BLOCK_S=16, BLOCK_D=64, BLOCK_C=64, num_warps=1)
    broken = replace(target.choices[0], BLOCK_D=24)
    target = replace(target, choices=(target.choices[0], greedy, broken))
    with compiling_processes(1) as pool:
        trials = [pool.submit(assess, target, choice, {}, gpu) for choice in target.choices]
        sound, spilling, invalid = [trial.result() for trial in trials]
    assert not sound.dropped
    assert 1e-6 < sound.predicted < 1e-4
    assert "spills" in spilling.dropped
    assert invalid.dropped
    assert spilling.predicted is invalid.predicted is None


SMALL = Workload(paper_unit(8, groups=4), 1, 4, 4, torch.float16, CHIPS["sm_90"])


def forget_the_relu(device):
    """From now on the device computes its unit without the branches' activation."""
    subject = device._subject
    if isinstance(subject, subjects.TrainingSubject):
        subject.unit = subject.unit._replace(spec=replace(subject.unit.spec, branch_act="identity"))
    else:
        subject.spec = replace(subject.spec, branch_act="identity")


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["branch_store", "gate", SCHEDULE])
def test_a_device_runs_checks_and_times_candidates(kind):
    """Interpreted here, on a GPU the same code runs compiled."""
    device = Device(CPU, SHORT)
    target = next(t for t in targets_of("small", SMALL, 2) if t.kind == kind)
    device.begin(target, {})
    assert len(target.choices) >= 2
    assert not any(device.wrong(choice) for choice in target.choices)
    times = device.times(target.choices)
    assert set(times) == set(target.choices)
    assert all(isinstance(seconds, float) and seconds > 0 for seconds in times.values())
    assert device.trouble() == ""
    assert device.wrong(target.choices[1]) == ""
    forget_the_relu(device)
    assert "allowed" in device.wrong(target.choices[1])


@pytest.mark.interpret
@pytest.mark.parametrize(
    "kind", ["branch_train", "reduction", pytest.param("branch_grad", marks=needs_narrow_products)]
)
def test_a_device_checks_the_gradients_of_training_and_times_its_launches(kind):
    device = Device(CPU, SHORT)
    target = next(t for t in targets_of("small", replace(SMALL, n=2), 2, TRAINING) if t.kind == kind)
    device.begin(target, {})
    assert [device.wrong(choice) for choice in target.choices] == ["", ""]
    times = device.times(target.choices)
    assert all(isinstance(seconds, float) and seconds > 0 for seconds in times.values())
    assert device.wrong(target.choices[1]) == ""
    forget_the_relu(device)
    assert "v: error" in device.wrong(target.choices[1])


@pytest.mark.interpret
@needs_narrow_products
def test_wrong_gradients_alone_are_caught_where_only_a_part_of_the_batch_fits_in_float64(monkeypatch):
    through_autograd = subjects._through_autograd

    def narrow(x, *others):
        if x.dtype == torch.float64 and len(x) > 2:
            raise torch.OutOfMemoryError("too many samples")
        return through_autograd(x, *others)

    monkeypatch.setattr(subjects, "_through_autograd", narrow)
    device = Device(CPU, SHORT)
    target = next(t for t in targets_of("small", replace(SMALL, n=4), 1, TRAINING) if t.kind == "branch_grad")
    device.begin(target, {})
    assert device._subject.judged == 2
    assert device.wrong(target.choices[0]) == ""
    monkeypatch.setattr(subjects, "step", lambda *given: _without_weights(*step(*given)))
    assert device.wrong(target.choices[0]).startswith("weights: error")


def _without_weights(v, gradients):
    return v, [torch.zeros_like(g) if i and g.dim() == 4 else g for i, g in enumerate(gradients)]


@pytest.mark.interpret
def test_what_is_timed_is_the_targets_own_launch_with_the_settled_configs(monkeypatch):
    found = {t.kind: t for t in targets_of("small", SMALL, 2)}
    settled = {found["branch_store"].key: found["branch_store"].choices[1]}
    timed = {}

    def measure(contestants, timer, budget, into):
        timed.update({key: contestant.call for key, contestant in contestants.items()})
        into.samples.update({key: {protocol.COLD: [2.0]} for key in contestants})

    monkeypatch.setattr(protocol, "measure", measure)
    device, gate = Device(CPU, SHORT), found["gate"]
    device.begin(gate, settled)
    assert [device.wrong(choice) for choice in gate.choices] == ["", ""]
    assert device.times(gate.choices) == dict.fromkeys(gate.choices, 2e-3)
    for call, choice in zip(timed.values(), gate.choices, strict=True):
        assert call.kernel.fn.__name__ == "gate_fwd_kernel"
        assert call.constexprs["BLOCK_S"] == dump_config(choice)["BLOCK_S"]
    assert gate.plan(gate.choices[0], settled).branch_launches[0].config == found["branch_store"].choices[1]


@pytest.mark.interpret
def test_a_candidate_that_fails_while_it_is_timed_says_why():
    device = Device(CPU, SHORT)
    target = next(t for t in targets_of("small", SMALL, 2) if t.kind == "gate")
    device.begin(target, {})
    first, second = target.choices
    assert [device.wrong(choice) for choice in target.choices] == ["", ""]

    def fail():
        raise RuntimeError("out of resources")

    device._calls[second] = fail
    times = device.times(target.choices)
    assert isinstance(times[first], float)
    assert times[second] == "RuntimeError: out of resources"
