"""The CPU's schedules: who gets them, which of them, and how many samples at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..layout import memory_format
from ..params import Branch, Gate
from ..plan import Plan
from ..reasons import state_reason, tracing_reason, unit_reason
from ..spec import SKSpec
from .convolution import packs_weights
from .merging import merged_branch

# A batch whose branch takes no more than this is computed whole, and its last branch becomes the result in place. A
# larger one would leave the caches between two steps, and the memory its branches take would go back to the system at
# every call, to be mapped and cleared anew at the next: it is computed in parts.
WHOLE_BYTES = 4 << 20
PART_BYTES_PER_THREAD = 1 << 20
# Weights per value of input and output from which both are converted in NCHW, so that weights are laid out once.
LEAST_WEIGHTS = 2


class _Costs(NamedTuple):
    """What merging trades, in multiply-adds of oneDNN's convolution.

    Fitted to times of "folded" and "merged" on an AMD EPYC (Zen 4), and of "train" and "train_merged" on an Intel Xeon
    (AVX-512), two threads, batch 8, float32, over 4 to 32 channels per group, 32 groups, 14 to 56 pixels a side, NCHW
    and channels_last.

    Attributes:
        convolutions: how often a product is computed: once, or for the output and both gradients.
        branch_output: an output of one branch, its products aside: stored, reordered, pooled, selected.
        merged_output: an output of the merged convolution, and its share of the input's sums and of copies.
        weight: a weight of a sample's own kernel: built, reordered, read.
        call: the small operators around a merged convolution; those of its gate cost twice as much.
    """

    convolutions: int
    branch_output: int
    merged_output: int
    weight: int
    call: int


_INFERENCE_COSTS = _Costs(1, 85, 90, 90, 15_000_000)
_TRAINING_COSTS = _Costs(3, 275, 410, 650, 30_000_000)
_SCHEDULES = "the CPU's schedules"
_NOT_TRITON = ("triton", 'x is on "cpu", where "auto" takes PyTorch\'s operators')


def reason(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> str:
    """Why the CPU's schedules cannot run the unit on `x`; "" if they can."""
    return _call_reason(x, spec) or state_reason(x, branches, gate, _SCHEDULES)


def training_reason(x: Tensor, branches: Sequence[Branch], gate: Gate, spec: SKSpec) -> str:
    """Why the CPU's training schedules cannot run the unit on `x`; "" if they can."""
    return (
        _call_reason(x, spec)
        or _watched()
        or state_reason(x, branches, gate, _SCHEDULES, is_training=True)
        or _untrained_part(spec)
    )


def _watched() -> str:
    """A dispatch mode may keep a result, as selective checkpointing does, that is then written over."""
    mode = _get_current_dispatch_mode()
    return f"a {type(mode).__name__} is active; {_SCHEDULES} of training write in place" if mode else ""


def _untrained_part(spec: SKSpec) -> str:
    """The part of a unit that only autograd trains on a CPU; "" if there is none."""
    for part, is_there in (
        ("the branches have norms", spec.branch_norm),
        (f"branch_act is {spec.branch_act}", spec.branch_act != "identity"),
        ("the gate has a norm", spec.gate_norm),
    ):
        if is_there:
            return f"{part}; {_SCHEDULES} train linear branches without norms"
    return ""


def _call_reason(x: Tensor, spec: SKSpec) -> str:
    return (
        tracing_reason(_SCHEDULES)
        or ("" if x.device.type == "cpu" else f'x is on "{x.device.type}"; {_SCHEDULES} run on a CPU')
        or unit_reason(spec, _SCHEDULES)
    )


def plan(x: Tensor, spec: SKSpec, *, is_training: bool = False) -> Plan:
    """The plan for an input that :func:`reason` or, with `is_training`, :func:`training_reason` accepts."""
    n, _, h, w = x.shape
    is_channels_last = memory_format(x) == torch.channels_last
    can_pack = not is_training and packs_weights(x.dtype)
    threads = torch.get_num_threads()
    return _plan(spec, n, h, w, x.dtype, is_channels_last, can_pack, threads, is_training)


def _converting_pays(spec: SKSpec, n: int, h_in: int, w_in: int) -> bool:
    """Whether to convert x ``[n, C_in, h_in, w_in]`` to channels_last and the output back, so that weights are laid out
    once: weights outweigh both by far."""
    h, w = spec.output_size(h_in, w_in)
    fan_in = [spec.branch_in_channels // b.groups * b.kernel_size**2 for b in spec.branches]
    activations = n * (spec.in_channels * h_in * w_in + spec.out_channels * h * w)
    return spec.out_channels * sum(fan_in) >= LEAST_WEIGHTS * activations


@lru_cache(maxsize=1024)
def _plan(
    spec: SKSpec,
    n: int,
    h_in: int,
    w_in: int,
    dtype: torch.dtype,
    is_channels_last: bool,
    can_pack: bool,
    threads: int,
    is_training: bool,
) -> Plan:
    h, w = spec.output_size(h_in, w_in)
    m = spec.num_branches
    names = ("train", "train_merged") if is_training else ("folded", "merged")
    part_samples = _part_samples(n, spec.out_channels * h * w * dtype.itemsize, threads)
    reads = spec.in_channels * h_in * w_in / (spec.out_channels * h * w)
    not_merged = _unmergeable_reason(spec)
    if is_training and not not_merged and dtype.itemsize < 4:
        not_merged = f"gradients of each sample's own kernels would be rounded to {dtype}"
    if not not_merged:
        # Samples lie side by side along the channels in NCHW only.
        samples = 1 if is_channels_last else part_samples
        costs = _TRAINING_COSTS if is_training else _INFERENCE_COSTS
        pays, balance = _merge_balance(spec, n, h, w, math.ceil(n / max(1, samples)), costs)
        if pays:
            return Plan(
                "torch",
                names[1],
                passes=2 * reads + (1 if samples == n else 3),
                dtype=dtype,
                rejected=(_NOT_TRITON, (names[0], balance)),
                samples=samples,
                merged_branch=merged_branch(spec),
            )
        not_merged = balance
    rejected = (_NOT_TRITON, (names[1], not_merged))
    if is_training:
        # The input for each branch, which is written, read to pool, and read to be added to the output; of two, their
        # difference is written besides.
        passes = m * reads + 2 * m + 2 + 3 * (m - 1) + 3 * (m == 2)
        return Plan("torch", names[0], passes, dtype, rejected)
    is_packed = can_pack and (is_channels_last or _converting_pays(spec, n, h_in, w_in))
    convolve = m * (3 + 2 * (spec.branch_has_relu and not is_packed))
    convert = 2 * reads + 2 if is_packed and not is_channels_last else 0
    select = 3 if m == 2 else 2 + 3 * (m - 1)
    passes = convert + convolve + select
    return Plan("torch", names[0], passes, dtype, rejected, is_packed=is_packed, samples=part_samples)


def _part_samples(n: int, sample_bytes: int, threads: int) -> int:
    """Samples to compute at a time, by the bytes of a sample's branch."""
    part_bytes = PART_BYTES_PER_THREAD * threads
    if n * sample_bytes <= max(WHOLE_BYTES, part_bytes):
        return n
    parts = math.ceil(n / max(1, part_bytes // sample_bytes))
    return math.ceil(n / parts)


def _unmergeable_reason(spec: SKSpec) -> str:
    """Why the branches cannot become one convolution; "" if they can."""
    if spec.branch_act != "identity":
        return f"branch_act is {spec.branch_act}; only linear branches merge"
    if spec.num_branches == 1:
        return "there is one branch"
    if spec.split_input:
        return "split_input: the branches read different channels"
    if len({branch.groups for branch in spec.branches}) > 1:
        return "the branches differ in groups"
    if spec.branches[0].groups == spec.branch_in_channels:
        return "oneDNN's depthwise convolutions are too fast for merging to pay"
    side, least = merged_branch(spec).kernel_size, min(branch.kernel_size for branch in spec.branches)
    if side > 2 * least:  # rounding errors grow as the square root of the number of products: as the side
        return f"a sum over {side}x{side} taps may err more than twice as much as one over {least}x{least}"
    return ""


def _merge_balance(spec: SKSpec, n: int, h: int, w: int, parts: int, costs: _Costs) -> tuple[bool, str]:
    """Whether merging is expected to pay for outputs ``[n, C, h, w]``, and the comparison in words.

    Merging computes one set of outputs in place of M, and the merged kernel's products in place of all the branches';
    in return it builds weights for each sample, which large images make up for.
    """
    fan_in = spec.branch_in_channels // spec.branches[0].groups
    taps = merged_branch(spec).kernel_size ** 2
    branch_taps = sum(branch.kernel_size**2 for branch in spec.branches)
    apart = spec.num_branches * costs.branch_output + costs.convolutions * fan_in * branch_taps
    merged = costs.merged_output + fan_in * taps * (costs.convolutions + costs.weight / (h * w))
    merged += (2 + parts) * costs.call / max(1, n * spec.out_channels * h * w)
    words = f"{apart:.0f} in branches, {merged:.0f} merged"
    return merged < apart, f"predicted cost per output, in multiply-adds: {words}"
