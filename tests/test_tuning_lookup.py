"""The four levels in which a config is found, and what is never used."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sk_triton import SelectiveKernel, dispatch, explain, planning, use_backend
from sk_triton import workload as workload_module
from sk_triton.analytic import branch as analytic
from sk_triton.bench.grid import classic_unit
from sk_triton.chips import CHIPS, Chip, chip_of
from sk_triton.kernels.config import StreamConfig
from sk_triton.planning import make_plan
from sk_triton.preference import fastest_plan
from sk_triton.replay.calls import call_kind
from sk_triton.training.plan import make_training_plan, plan_training
from sk_triton.tuning import keys, launches, lookup, shipped, user_file
from sk_triton.tuning.entries import Entry, dump_config, dump_sections

from .tuned import H100, entry, origin, other_choice, requests, workload
from .versions import needs_narrow_products


def source(plan, kind):
    (found,) = [source for source in plan.sources if source.kind == kind]
    return found


@pytest.fixture
def request_(folder, monkeypatch):
    monkeypatch.setattr(lookup, "shipped", lambda chip: {})
    return requests("store", workload())["branch_store"]


def tune(request, choice, chip=H100, **changes):
    assert user_file.save(origin(chip, **changes), {request.key: entry(choice, request.n)})


def store(work):
    plan = make_plan("store", work)
    return plan.branch_launches[0].config, source(plan, "branch_store").text


def test_the_key_names_the_launch(request_):
    assert request_.key == "inference/branch_store/float16/c128-128/g32/k3d1+k3d2/s1/56x56/n7"
    kinds = [
        r.key.split("/")[1] for name in ("store", "recompute") for r in requests(name, workload()).values()
    ]
    assert kinds == ["branch_store", "gate", "select", "branch_pool", "branch_select", "gate"]
    linear = requests("merged", workload(spec=classic_unit(128)))
    assert list(linear) == ["border_sums", "merged_conv", "gate"]
    fp32 = replace(workload(), dtype=torch.float32)
    tf32 = replace(fp32, allow_tf32=True)
    assert requests("store", fp32)["branch_store"].key != requests("store", tf32)["branch_store"].key
    assert all(keys.kind_of_key(r.key).direction == "inference" for r in linear.values())


def test_the_four_levels_in_their_order(request_, monkeypatch):
    packaged, tuned = StreamConfig(8, 8, 4, 4, RUN_H=1, RUN_W=2), other_choice(request_)
    assert store(workload()) == (request_.analytic(), "analytic (sm_90)")
    monkeypatch.setattr(lookup, "shipped", lambda chip: {request_.key: packaged} if chip == "sm_90" else {})
    assert store(workload()) == (packaged, "configs/sm_90.json (predicted)")
    tune(request_, tuned)
    assert store(workload(n=300)) == (
        tuned,
        "tuned for NVIDIA H100 80GB HBM3 (132 SMs) at a batch of 128",
    )
    assert store(workload()) == (tuned, "tuned for NVIDIA H100 80GB HBM3 (132 SMs)")


def test_an_entry_serves_batches_up_to_four_times_as_large_or_small_the_nearest_first(request_):
    at = {n: request for n in (16, 32, 128) for request in [requests("store", workload(n))["branch_store"]]}
    one, two = [config for config in request_.candidates() if config != request_.analytic()][:2]
    tune(at[128], one)
    assert "tuned" in store(workload(32))[1]
    assert "tuned" in store(workload(512))[1]
    assert store(workload(16))[1] == store(workload(513))[1] == "analytic (sm_90)"
    tune(at[16], two)
    assert [store(workload(n))[0] for n in (16, 31, 40, 64)] == [two, two, one, one]


def test_other_shapes_dtypes_and_gpus_do_not_take_the_entry(request_):
    tune(request_, other_choice(request_))
    for other in (
        workload(size=28),
        replace(workload(), dtype=torch.bfloat16),
        workload(chip=replace(H100, gpu="NVIDIA H100 PCIe", processors=114)),
        workload(chip=replace(H100, gpu="NVIDIA H200")),
        workload(chip=replace(H100, processors=66)),
        workload(chip=CHIPS["sm_90"]),
    ):
        assert store(other)[1] == "analytic (sm_90)"


def test_an_unknown_gpu_takes_its_architectures_configs_and_says_so(request_, monkeypatch):
    unknown = Chip("sm_90", 132, 50, "NVIDIA H100 NVL")
    tune(request_, other_choice(request_))
    assert lookup.describe(unknown) == (
        "NVIDIA H100 NVL (132 SMs), sm_90: nothing is tuned for it, the choices for sm_90 serve"
    )
    assert lookup.describe(H100) == "NVIDIA H100 80GB HBM3 (132 SMs), sm_90: 1 launches are tuned for it"


@pytest.mark.parametrize("changes", [{"triton": "3.0.0"}, {"kernels": "0123456789abcdef"}])
def test_a_stale_entry_is_not_used(request_, changes):
    tune(request_, other_choice(request_), **changes)
    assert store(workload()) == (request_.analytic(), "analytic (sm_90)")


def test_where_the_analytic_choice_won_it_is_made_anew_and_said_so(request_):
    tune(request_, None)
    assert store(workload()) == (
        request_.analytic(),
        "analytic (sm_90), confirmed on NVIDIA H100 80GB HBM3 (132 SMs)",
    )
    assert store(workload(64))[1] == "analytic (sm_90)"


def test_a_config_outside_of_the_search_space_is_not_used(request_):
    tune(request_, replace(request_.analytic(), BLOCK_W=64, num_warps=32))
    with pytest.warns(RuntimeWarning, match="a tuned entry is not used: inference/branch_store"):
        assert store(workload()) == (request_.analytic(), "analytic (sm_90)")


def test_a_file_that_the_package_ships_for_a_gpu_counts_after_the_users_own(request_, tmp_path, monkeypatch):
    theirs, mine = [config for config in request_.candidates() if config != request_.analytic()][:2]
    text = dump_sections({origin(): {request_.key: entry(theirs)}})
    (tmp_path / "nvidia-h100-80gb-hbm3-132.json").write_text(text)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.contributed.cache_clear()
    assert store(workload()) == (theirs, "tuned for NVIDIA H100 80GB HBM3 (132 SMs)")
    tune(request_, mine)
    assert store(workload())[0] == mine
    assert store(workload(is_pinned=True))[0] == theirs
    shipped.contributed.cache_clear()


def test_a_plan_that_is_remembered_is_made_anew_after_tuning_in_the_same_process(request_):
    before = planning.plan_schedule("store", workload())
    assert planning.plan_schedule("store", workload()) is before
    tune(request_, other_choice(request_))
    assert planning.plan_schedule("store", workload()).branch_launches[0].config == other_choice(request_)


def test_a_training_plan_is_made_anew_after_tuning_in_the_same_process(folder, monkeypatch):
    monkeypatch.setattr(lookup, "shipped", lambda chip: {})
    work = workload()
    before = plan_training(work, "branches").select
    request = requests("store", work)["select"]
    assert before == request.analytic()
    tune(request, other_choice(request))
    assert plan_training(work, "branches").select == other_choice(request)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("reduction", "reduction"), pytest.param("branch_grad", "gradient", marks=needs_narrow_products)],
)
def test_training_takes_what_was_tuned_for_it(kind, field, folder):
    work = workload()
    with lookup.experiment() as asked:
        make_training_plan(work, "branches")
    request = next(request for request in asked if request.kind == kind)
    assert request.key.startswith(f"training/{kind}/")
    assert getattr(plan_training(work, "branches"), field) == request.analytic()
    tune(request, other_choice(request))
    plan = plan_training(work, "branches")
    assert getattr(plan, field) == other_choice(request)
    assert "tuned for" in next(str(source) for source in plan.sources if source.kind == kind)
    # A walk of so many tiles is a candidate of every batch, and serves those near by.
    assert getattr(plan_training(replace(work, n=200), "branches"), field) == other_choice(request)


def test_a_measured_schedule_comes_before_the_expected_one(folder):
    work = workload()
    assert fastest_plan(work).schedule == "recompute"
    user_file.save(origin(), {launches.schedule_key(work): entry("store")})
    plan = fastest_plan(work)
    assert plan.schedule == "store"
    assert source(plan, "schedule").text == "tuned for NVIDIA H100 80GB HBM3 (132 SMs)"
    assert dict(plan.rejected)["recompute"] == "slower: tuned for NVIDIA H100 80GB HBM3 (132 SMs)"
    assert "linear" in dict(plan.rejected)["merged"]


def test_where_the_device_failed_nothing_is_confirmed(request_):
    failed = Entry(None, 128, 0.0, 0.0, (), "the GPU failed: unspecified launch failure")
    stayed = Entry(None, 128, 100e-6, 100e-6)
    user_file.save(origin(), {request_.key: failed, requests("store", workload())["select"].key: stayed})
    text = "analytic (sm_90), not tuned on NVIDIA H100 80GB HBM3 (132 SMs): the GPU failed: unspecified launch failure"
    assert store(workload()) == (request_.analytic(), text)
    assert store(workload(64))[1] == "analytic (sm_90)"
    assert lookup.describe(H100).endswith("0 launches are tuned for it, 2 keep the analytic choice")


def test_a_measured_schedule_that_cannot_run_is_not_used(folder):
    work = workload()
    user_file.save(origin(), {launches.schedule_key(work): entry("merged")})
    with pytest.warns(RuntimeWarning, match="has no candidate merged"):
        assert fastest_plan(work).schedule == "recompute"


@pytest.mark.parametrize(
    ("chosen", "measured", "asked", "expected"),
    [
        ("store", 128, 40, "store"),
        ("store", 1, 2, "recompute"),  # where "gated" is expected at one sample, and no longer at two
        ("store", 2, 1, "gated"),
        ("gated", 4, 2, "gated"),
        ("gated", 4, 8, "recompute"),  # more samples, more programs, each with a gate
    ],
)
def test_a_measured_schedule_serves_batches_that_the_same_is_expected_for(
    chosen, measured, asked, expected, folder
):
    user_file.save(origin(), {launches.schedule_key(workload(n=measured)): entry(chosen, measured)})
    assert fastest_plan(workload(n=asked)).schedule == expected


def test_an_entry_that_does_not_serve_lets_another_one(folder):
    confirmed, near = (launches.schedule_key(workload(n=n)) for n in (1, 8))
    user_file.save(origin(), {confirmed: Entry("gated", 1, 100e-6, 100e-6), near: entry("store", 8)})
    assert fastest_plan(workload(n=2)).schedule == "store"


def test_an_experiment_sees_its_own_choices_only_and_leaves_nothing_behind(request_):
    chosen = other_choice(request_)
    tune(request_, chosen)
    with lookup.analytic_only():
        assert make_plan("store", workload()).branch_launches[0].config == request_.analytic()
    with lookup.experiment({request_.key: request_.candidates()[-1]}):
        assert make_plan("store", workload()).branch_launches[0].config == request_.candidates()[-1]
    with lookup.experiment() as asked:
        make_plan("store", workload())
    assert [request.kind for request in asked] == ["branch_store", "gate", "select"]
    assert store(workload())[0] == chosen


def test_deterministic_algorithms_pin_the_packages_configs(request_, monkeypatch):
    """What a user's file says, or when it was written, must not change a deterministic result."""
    tune(request_, other_choice(request_))
    unit = SelectiveKernel(128, groups=32, rd_channels=32, split_input=False).eval()
    monkeypatch.setattr(dispatch, "_kernels_reason", lambda *args: ("", False))
    monkeypatch.setattr(workload_module, "chip_of", lambda device: H100)
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    x = torch.empty(128, 128, 56, 56, dtype=torch.float16, device="meta")
    x = x.to(memory_format=torch.channels_last)

    def chosen():
        with use_backend("triton", schedule="store"):
            plan = dispatch.choose(x, unit.branches(), unit.gate(), unit.spec, backend="triton")
        return plan.branch_launches[0].config

    assert chosen() == other_choice(request_)
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == request_.analytic()
        assert (
            "1 that the user tuned are not used: deterministic algorithms are asked for"
            in lookup.describe(H100)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen() == other_choice(request_)


@pytest.mark.interpret
def test_calls_tune_nothing_and_write_nothing(folder, monkeypatch):
    """Neither plain inference, nor training, nor tracing: tuning is a command."""
    from sk_triton.bench.measuring import protocol

    monkeypatch.setattr(protocol, "measure", lambda *args, **options: pytest.fail("measured"))
    monkeypatch.setattr(user_file, "save", lambda *args: pytest.fail("tuned"))
    monkeypatch.setattr(workload_module, "chip_of", lambda device: H100)
    layer, x = SelectiveKernel(8, groups=4).eval(), torch.randn(2, 8, 4, 4)
    with torch.no_grad(), use_backend("triton"):
        layer(x)
    layer.train()(x).sum().backward()
    torch.compile(layer.eval(), backend="eager")(x)
    assert not folder.exists()


@pytest.mark.interpret
def test_explain_shows_level_and_key(folder, monkeypatch):
    from sk_triton import explanation

    monkeypatch.setattr(workload_module, "chip_of", lambda device: H100)
    monkeypatch.setattr(explanation, "chip_of", lambda device: H100)
    layer, x = SelectiveKernel(8, groups=4, rd_channels=8).eval(), torch.randn(1, 8, 4, 4)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad(), use_backend("triton", schedule="store"):
        key = source(explain(layer, x).plan, "gate").key
        request = requests("store", replace(workload(1, size=4, spec=layer.spec), dtype=torch.float32))[
            "gate"
        ]
        assert request.key == key
        user_file.save(origin(), {key: entry(other_choice(request), 1)})
        text = str(explain(layer, x))
    assert "gpu       NVIDIA H100 80GB HBM3 (132 SMs), sm_90: 1 launches are tuned for it" in text
    assert "source    gate: tuned for NVIDIA H100 80GB HBM3 (132 SMs)" in text
    assert f"  key     {key}" in text
    assert "source    select: analytic (sm_90)" in text


def test_a_shipped_entry_is_found_by_its_key(monkeypatch):
    work = workload(chip=CHIPS["sm_90"])
    request = requests("store", work)["branch_store"]
    other = other_choice(request)
    monkeypatch.setattr(lookup, "shipped", lambda chip: {request.key: other} if chip == "sm_90" else {})
    assert store(work) == (other, "configs/sm_90.json (predicted)")
    assert store(replace(work, chip=CHIPS["sm_80"]))[1] == "analytic (sm_80)"


@pytest.mark.parametrize("changes", [{"n": 100}, {"chip": Chip("sm_90", 114, 50, "NVIDIA H100 PCIe")}])
def test_a_prediction_for_another_batch_or_product_does_not_serve(changes, monkeypatch):
    work = workload(chip=CHIPS["sm_90"])
    request = requests("store", work)["branch_store"]
    monkeypatch.setattr(lookup, "shipped", lambda chip: {request.key: other_choice(request)})
    assert store(work)[1] == "configs/sm_90.json (predicted)"
    other = replace(work, **changes)
    assert store(other) == (requests("store", other)["branch_store"].analytic(), "analytic (sm_90)")


@needs_narrow_products
@pytest.mark.parametrize("chip", CHIPS)
def test_shipped_files_are_current(chip):
    """A file made for other kernels would be ignored; regenerate with `sk-triton resources --write-configs`."""
    content = json.loads(shipped.shipped_file(chip).read_text())
    assert content["schema"] == shipped.SCHEMA
    assert content["kernels"] == keys.kernels_hash()
    assert content["chip"] == chip
    assert content["evidence"] == "predicted"
    assert content["triton"]
    loaded = shipped.shipped(chip)
    assert len(loaded) == len(content["configs"]) > 0
    for name, config in loaded.items():
        assert dump_config(config) == content["configs"][name]
        assert keys.kind_of_key(name).name.startswith("branch_")


@needs_narrow_products
def test_shipped_content_is_read_back(tmp_path, monkeypatch):
    request = requests("store", workload())["branch_store"]
    content = shipped.shipped_content("sm_90", {request.key: request.analytic()}, "3.9.0")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    shipped.shipped_file("sm_90").write_text(json.dumps(content))
    for expected in ({request.key: request.analytic()}, {}):
        shipped.shipped.cache_clear()
        assert shipped.shipped("sm_90") == expected
        monkeypatch.setattr(shipped, "kernels_hash", lambda: "another")
    shipped.shipped.cache_clear()


def test_the_analytic_choice_uses_the_devices_own_processors():
    few = replace(H100, processors=8)
    choose = analytic.branch_config
    shape = planning.conv_shapes(workload().spec)[0][2]
    a, b = (choose(shape, 4, 56, 56, torch.float16, False, chip, task="store") for chip in (H100, few))
    assert a != b


def test_recorded_calls_are_planned_anew_once_the_configs_change_or_are_pinned(folder):
    x = torch.empty(1, 8, 4, 4)
    with torch.no_grad():
        kinds = [call_kind(x), call_kind(x)]
        assert kinds[0] == kinds[1]
        user_file.changed()
        kinds.append(call_kind(x))
        torch.use_deterministic_algorithms(True)
        try:
            kinds.append(call_kind(x))
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(set(kinds)) == 3


def test_a_device_counts_by_its_own_name_and_processors(monkeypatch):
    facts = SimpleNamespace(
        major=9, minor=0, multi_processor_count=114, name="NVIDIA H100 PCIe", L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    chip_of.cache_clear()
    assert chip_of(torch.device("cuda", 0)) == Chip("sm_90", 114, 50, "NVIDIA H100 PCIe")
    chip_of.cache_clear()
    # An L4 has a third less than the largest product with its chip.
    facts.major, facts.minor, facts.L2_cache_size = 8, 9, 48 << 20
    assert chip_of(torch.device("cuda", 0)).l2_mib == 48
    chip_of.cache_clear()
    facts.major = 5
    assert chip_of(torch.device("cuda", 0)) is None
    chip_of.cache_clear()
