"""What is tried for a launch: every config can run, and so can what the package ships."""

import pytest
import torch

from sk_triton import planning
from sk_triton.analytic.grad import grad_config
from sk_triton.bench.grid import CASES, classic_unit
from sk_triton.bench.tuning.shortlist import shortlist
from sk_triton.chips import CHIPS, PREFETCHING
from sk_triton.kernels.config import GradWideConfig
from sk_triton.kernels.geometry import ConvShape, blocking, can_run, tiles
from sk_triton.planning import make_plan
from sk_triton.tuning import shipped, space
from sk_triton.workload import Workload

from .tuned import requests, workload
from .versions import needs_narrow_products


@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_every_candidate_is_valid_for_its_launch_and_the_analytic_choice_is_among_them(chip):
    """For every unit of the support grid but for those in bfloat16, whose candidates are those of float16."""
    seen = set()
    for case in CASES:
        if case.dtype == torch.bfloat16:
            continue
        work = Workload(case.spec, case.n, case.size, case.size, case.dtype, CHIPS[chip], case.allow_tf32)
        for schedule in planning.possible_schedules(work):
            for request in requests(schedule, work).values():
                if request.key in seen:
                    continue
                seen.add(request.key)
                candidates = request.candidates()
                assert len(set(candidates)) == len(candidates) > 0
                if request.kind not in ("border_sums", "merged_conv"):  # whose programs depend on the batch
                    assert request.analytic() in candidates
                short = shortlist(candidates, request.analytic(), request.cost, 6)
                assert short[0] == request.analytic()
                assert set(short[1:]) <= set(candidates)
                if request.kind.startswith("branch"):
                    (shape,) = {launch.shape for launch in make_plan(schedule, work).branch_launches[:1]}
                    task = request.kind.removeprefix("branch_")
                    for config in candidates:
                        assert can_run(task, shape, config)
                        assert blocking(shape, config).blocks > 0
                        assert min(tiles(shape, config, case.size, case.size)) > 0


def test_a_space_does_not_depend_on_the_batch():
    def spaces(n):
        works = workload(n), workload(n, spec=classic_unit(128))
        asked = [requests(name, w).values() for w in works for name in planning.possible_schedules(w)]
        return [request.candidates() for found in asked for request in found]

    assert spaces(1) == spaces(128)


@needs_narrow_products
@pytest.mark.parametrize("chip", CHIPS)
def test_what_the_package_ships_is_in_the_space_of_its_launch(chip):
    configs, met = shipped.shipped(chip), set()
    for case in CASES:
        work = Workload(case.spec, case.n, case.size, case.size, case.dtype, CHIPS[chip], case.allow_tf32)
        for schedule in planning.possible_schedules(work) if case.name.startswith("stage") else ():
            for request in requests(schedule, work).values():
                if request.key in configs:
                    met.add(request.key)
                    assert configs[request.key] in request.candidates(), request.key
    assert met == set(configs)


@pytest.mark.parametrize("n", [0, 1, 5, 32, 128])
def test_a_strip_of_gradients_is_as_high_as_the_warps_that_a_gpu_holds_allow(n):
    shape = ConvShape(128, 128, 32, (3, 3), (1, 2))
    config = grad_config(shape, n, 56, 56, torch.float16, CHIPS["sm_90"])
    rows = {0: 7, 1: 7, 5: 10, 32: 56, 128: 56}
    assert rows[n] == config.RUN_H
    assert config in space.grad_configs(shape, 56, 56, torch.float16, config, CHIPS["sm_90"])


@pytest.mark.parametrize("groups", [8, 32, 128])
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_configs_of_gradients_are_ranked_whatever_prefetches(chip, groups):
    shape = ConvShape(128, 128, groups, (3, 3), (1, 2))
    choice = grad_config(shape, 128, 56, 56, torch.float16, chip)
    found = space.grad_configs(shape, 56, 56, torch.float16, choice, chip)
    wide = {config.PREFETCH for config in found if isinstance(config, GradWideConfig)}
    assert wide == {True, False} & {chip.name in PREFETCHING, False}
    ranked = shortlist(found, choice, None, 6)
    assert ranked[0] == choice
    assert len(ranked) == 6
