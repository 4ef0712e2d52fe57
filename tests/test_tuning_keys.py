"""What an entry speaks of, and of what it does not: the launch, the batch and the schedule that it was measured for."""

from __future__ import annotations

from dataclasses import replace

from sk_triton import planning
from sk_triton.bench.grid import classic_unit
from sk_triton.kernels.config import TapConfig
from sk_triton.planning import make_plan
from sk_triton.preference import fastest_plan
from sk_triton.training.plan import make_training_plan, plan_training
from sk_triton.tuning import launches, user_file
from sk_triton.tuning.entries import Entry

from .tuned import entry, origin, requests, workload
from .versions import needs_narrow_products


def source_of(plan, kind):
    (found,) = [source for source in plan.sources if source.kind == kind]
    return found


def test_what_is_tuned_for_a_launch_changes_no_expectation(folder):
    """Were it so, an entry of the schedule would come to mean another than was measured."""
    work = workload(spec=classic_unit(1024), size=7)
    shape = planning.conv_shapes(work.spec)[0][2]
    expected = fastest_plan(work)
    step = plan_training(work, "branches")
    candidates = requests("store", work)["branch_store"].candidates()
    tap = next(config for config in candidates if isinstance(config, TapConfig))
    user_file.save(origin(), {launches.branch_key(work, shape, "store"): entry(tap)})
    assert make_plan("store", work).branch_launches[0].config == tap
    assert (fastest_plan(work).schedule, fastest_plan(work).rejected) == (
        expected.schedule,
        expected.rejected,
    )
    assert [la.task for la in plan_training(work, "branches").branch_launches] == [
        la.task for la in step.branch_launches
    ]
    user_file.save(origin(), {launches.schedule_key(work): Entry(expected.schedule, 128, 60e-6, 60e-6)})
    assert fastest_plan(work).schedule == expected.schedule
    assert source_of(fastest_plan(work), "schedule").text == (
        "analytic (sm_90), confirmed on NVIDIA H100 80GB HBM3 (132 SMs)"
    )


def test_a_batch_of_the_same_power_of_two_is_told_apart(folder):
    """Five samples are kept under the key of eight."""
    at = workload(n=5)
    user_file.save(origin(), {launches.schedule_key(at): entry("store", 5)})
    assert source_of(fastest_plan(at), "schedule").text == "tuned for NVIDIA H100 80GB HBM3 (132 SMs)"
    other = source_of(fastest_plan(replace(at, n=8)), "schedule").text
    assert other == "tuned for NVIDIA H100 80GB HBM3 (132 SMs) at a batch of 5"
    user_file.save(origin(), {launches.schedule_key(at): entry("gated", 5)})
    assert fastest_plan(at).schedule == "gated"
    assert (
        fastest_plan(replace(at, n=8)).schedule == "recompute"
    )  # eight samples are more programs, each with a gate


def test_the_border_of_another_input_has_another_key():
    """Inputs of 55 and of 56 rows give as many rows of outputs, but other strips."""
    spec = replace(classic_unit(128), stride=2)
    keys_of = {
        size: {
            kind: request.key for kind, request in requests("merged", workload(spec=spec, size=size)).items()
        }
        for size in (55, 56)
    }
    assert keys_of[55]["merged_conv"] == keys_of[56]["merged_conv"]
    assert "/55x55/" in keys_of[55]["border_sums"]
    assert "/56x56/" in keys_of[56]["border_sums"]


@needs_narrow_products
def test_every_config_of_a_training_step_says_where_it_is_from(folder):
    kinds = [found.kind for found in make_training_plan(workload(), "branches").sources]
    assert kinds == ["branch_train", "reduction", "select", "branch_grad"]
    folded = make_training_plan(workload(), "input")
    assert folded.select is None
    assert "select" not in [found.kind for found in folded.sources]
