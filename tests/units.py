"""Units for tests: hypothesis strategies of specs, and random parameters for a spec."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sk_triton.params import Branch, Gate
from sk_triton.spec import BranchSpec, SKSpec

ACTS = {"relu": nn.ReLU, "identity": lambda: None, "SiLU": nn.SiLU}


@st.composite
def specs(draw: st.DrawFn, acts: tuple[str, ...] = tuple(ACTS), linear: bool = False) -> SKSpec:
    """Small specs over every setting; ``linear`` asks for bare branches."""
    M = draw(st.integers(1, 3))
    split_input = draw(st.booleans())
    groups = [draw(st.sampled_from([1, 2, 4])) for _ in range(M)]
    common = math.lcm(*groups)
    branch_in = common * draw(st.integers(1, 2))
    branches = tuple(BranchSpec(draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2)), g) for g in groups)
    return SKSpec(
        branch_in * M if split_input else branch_in,
        common * draw(st.integers(1, 2)),
        branches,
        stride=draw(st.integers(1, 3)),
        split_input=split_input,
        branch_bias=draw(st.booleans()),
        branch_norm=not linear and draw(st.booleans()),
        branch_act="identity" if linear else draw(st.sampled_from(acts)),
        gate_width=draw(st.integers(1, 5)),
        gate_bias=draw(st.booleans()),
        gate_norm=draw(st.booleans()),
        gate_act=draw(st.sampled_from(acts)),
        select_bias=draw(st.booleans()),
    )


def mergeable(spec):
    """The spec with linear branches of the same groups and input."""
    groups = spec.branches[0].groups
    branches = tuple(dataclasses.replace(branch, groups=groups) for branch in spec.branches)
    return dataclasses.replace(spec, branches=branches, split_input=False, branch_act="identity")


# The classic class and the paper's unit, small.
CLASSIC = SKSpec(
    16, 16, (BranchSpec(3, groups=4), BranchSpec(5, groups=4)), gate_width=4, branch_norm=False,
    branch_bias=True, branch_act="identity",
)  # fmt: skip
PAPER = SKSpec(16, 16, (BranchSpec(3, 1, 4), BranchSpec(3, 2, 4)), gate_width=4)

sizes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))  # N, H, W


def random_unit(
    spec: SKSpec, dtype: torch.dtype = torch.float64, *, training: bool = False
) -> tuple[tuple[Branch, ...], Gate]:
    """Random parameters for a spec, with norms that are no identity; all of them require gradients."""
    C, d, M = spec.out_channels, spec.gate_width, spec.num_branches
    branches = tuple(
        Branch(
            _weight(shape, dtype),
            _weight((C,), dtype) if spec.branch_bias else None,
            random_norm(C, dtype, training) if spec.branch_norm else None,
            act=ACTS[spec.branch_act](),
        )
        for shape in spec.weight_shapes
    )
    gate = Gate(
        _weight((d, C), dtype),
        _weight((d,), dtype) if spec.gate_bias else None,
        random_norm(d, dtype, training) if spec.gate_norm else None,
        ACTS[spec.gate_act](),
        tuple(_weight((C, d), dtype) for _ in range(M)),
        tuple(_weight((C,), dtype) for _ in range(M)) if spec.select_bias else None,
    )
    return branches, gate


def random_norm(channels: int, dtype: torch.dtype, training: bool = False) -> nn.BatchNorm2d:
    """Batch norm whose parameters and running statistics are no identity."""
    norm = nn.BatchNorm2d(channels).to(dtype).train(training)
    randomize_norms(norm)
    return norm


@torch.no_grad()
def randomize_norms(module: nn.Module) -> None:
    """Give every batch norm inside a module parameters and running statistics that are no identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)


def tensors(branches: tuple[Branch, ...], gate: Gate) -> list[Tensor]:
    """Every parameter of a unit, the norms' included."""
    found: list[Tensor] = []
    for part in (*branches, gate):
        for value in part:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, nn.Module):
                found.extend(value.parameters())
            elif isinstance(value, tuple):
                found.extend(value)
    return found


def _weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    fan_in = max(1, math.prod(shape[1:]))
    return (torch.randn(shape, dtype=dtype) / math.sqrt(fan_in)).requires_grad_()
