"""The plan of schedule "train": which convolutions, with which configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ..chips import NARROW_PRODUCTS
from ..environment import triton_version
from ..kernels.config import DepthwiseConfig
from ..kernels.geometry import branch_refusal, tile_count
from ..plan import MAX_GATE_TILES, BranchLaunch, Plan
from ..planning import branch_launch, eager_passes, make_plan, plan_store
from ..preference import library_reason, recompute_reason
from ..save import Save
from ..tuning import launches as lookups
from ..tuning import user_file
from ..tuning.lookup import Found
from ..workload import Workload

# Channels per group up to which the gradients come from the kernels: those of 32 are predicted to take 147 µs of an
# H100's issue slots in stage 4, against 43 µs of memory.
MAX_GRADIENT_CHANNELS = 16
SELECT = "select"
"""The kind of launch that selects from stored branches."""


def make_training_plan(workload: Workload, save: Save) -> Plan:
    """The plan of schedule "train", which runs every unit: without branch launches where the library convolves, with
    folded launches where the forward pass writes no branch. Made anew."""
    spec = workload.spec
    store = plan_store(workload)
    m = spec.num_branches
    is_library = bool(library_reason(workload))
    # The depthwise kernel takes no moments; where it or the library convolves, statistics are a pass of their own.
    # Without norms nobody asks for them.
    launches = tuple(
        launch
        if isinstance(launch.config, DepthwiseConfig) or not spec.branch_norm
        else branch_launch(workload, launch.start, launch.stop, launch.shape, "train")
        for launch in store.branch_launches
        if not is_library
    )
    measured = sum(launch.stop - launch.start for launch in launches if launch.task == "train")
    reads = m if is_library else len(launches)
    # Convolutions are stored (and copied, where the library made them), pooled and selected.
    stored = (3 if is_library else 1) * m
    pools = _pools(workload, launches)
    output_passes = stored + (m - measured if spec.branch_norm else 0) + m * (1 - pools) + m + 1
    reduction = lookups.reduction_config(workload)
    gradient = _gradient_config(workload, launches)
    plan = replace(
        store,
        schedule="train",
        passes=(reads + 2 * workload.is_converted) * workload.input_passes + output_passes,
        rejected=(("reference", f"the kernels can run; eager's forward takes {eager_passes(spec)} passes"),),
        branch_launches=launches,
        pools=pools,
        gate=None,
        sources=(
            *(launch.source for launch in launches),
            reduction.source,
            *(source for source in store.sources if source.kind == SELECT),
            *([gradient.source] if gradient else []),
        ),
        reduction=reduction.config,
        gradient=gradient.config if gradient else None,
    )
    return _folded(plan, workload) if save == "input" else plan


plan_training = lru_cache(maxsize=1024)(make_training_plan)
"""As :func:`make_training_plan`, remembered."""


def _pools(workload: Workload, launches: Sequence[BranchLaunch]) -> bool:
    """Whether the launch that stores the branches pools them too: nothing stands between the two but a ReLU, and the
    gate has few enough tiles to add."""
    if workload.spec.branch_norm or len(launches) != 1:
        return False
    (launch,) = launches
    return tile_count(launch.shape, launch.config, *workload.output_size) <= MAX_GATE_TILES


def _folded(plan: Plan, workload: Workload) -> Plan:
    """`plan` with a forward pass that convolves anew instead of writing branches, where that is expected to pay."""
    if reason := recompute_reason(workload):
        return plan.rejecting("recompute", reason)
    recompute = make_plan("recompute", workload)
    (train,) = plan.branch_launches
    if reason := branch_refusal("measure", train.shape, train.config):
        return plan.rejecting("recompute", reason)
    # What takes moments and stores serves to take moments.
    moments = replace(train, task="measure")
    reads = workload.spec.branch_norm
    # Where kernels compute the gradients nothing selects from stored branches.
    selects = plan.gradient is None
    own = (source for source in plan.sources if selects or source.kind != SELECT)
    return replace(
        plan,
        passes=recompute.passes + reads * workload.input_passes,
        select=plan.select if selects else None,
        folded_launches=(moments, *recompute.branch_launches),
        sources=(*own, *(launch.source for launch in recompute.branch_launches)),
    )


def _gradient_config(workload: Workload, launches: tuple[BranchLaunch, ...]) -> Found | None:
    """Config of the kernels that compute the branches' gradients, None where the library does."""
    if (
        len(launches) != 1
        or workload.spec.group_channels > MAX_GRADIENT_CHANNELS
        or triton_version() < NARROW_PRODUCTS
    ):
        return None
    return lookups.grad_config(workload, launches[0].shape)


user_file.when_changed(plan_training.cache_clear)
