"""Passes over memory of each way to compute a unit, derived step by step from its description.

A pass (T) reads or writes one activation tensor once; an input of another size than the output counts as one all
the same. What is small is left out: weights, pooled sums, the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from sk_triton.spec import SKSpec

CONVOLUTION = "convolution"
"""What a step is called in which the library convolves."""
SPLIT = "split"
FUSE = "fuse"
SELECT = "select"
PHASES = (SPLIT, FUSE, SELECT)

FLOOR = 2
"""Read the input, write the output."""


@dataclass(frozen=True)
class Step:
    """One operator or kernel: the phase of the unit (paper, section 3.1) it serves, tensors it reads and writes."""

    name: str
    phase: str
    reads: int
    writes: int

    @property
    def passes(self) -> int:
        return self.reads + self.writes


@dataclass(frozen=True)
class Route:
    """One way to compute the unit. `source` is the key of who takes it, as in a `results.Record`."""

    source: str
    name: str
    steps: tuple[Step, ...]

    @property
    def passes(self) -> int:
        return sum(step.passes for step in self.steps)


def classic_class(spec: SKSpec) -> Route:
    """The classic class in eager mode: `cat` copies the branches into one tensor."""
    return Route("classic", "classic class, eager", _through_one_tensor(spec, "cat"))


def timm_module(spec: SKSpec) -> Route:
    """timm's `SelectiveKernel` in eager mode: `stack` copies the branches into one tensor."""
    return Route("timm", "timm, eager", _through_one_tensor(spec, "stack"))


def plain_paper(spec: SKSpec) -> Route:
    """`PaperUnit` of the peers in eager mode: no stack, weighted branches are added by fused multiply-adds."""
    m = spec.num_branches
    steps = (
        *_eager_branches(spec),
        Step("sum", FUSE, 2 * (m - 1), m - 1),
        Step("mean", FUSE, 1, 0),
        Step("weigh", SELECT, 1, 1),
        Step("add", SELECT, 2 * (m - 1), m - 1),
    )
    return Route("paper", "plain PyTorch, eager", steps)


def reference(spec: SKSpec) -> Route:
    """`sk_triton.reference`: as the plain unit, but each weighted branch is written before it is added."""
    m = spec.num_branches
    steps = (
        *_eager_branches(spec),
        Step("sum", FUSE, 2 * (m - 1), m - 1),
        Step("mean", FUSE, 1, 0),
        Step("weigh", SELECT, m, m),
        Step("sum", SELECT, 2 * (m - 1), m - 1),
    )
    return Route("ours-reference", "sk_triton, reference", steps)


def compiled(spec: SKSpec, source: str) -> Route:
    """`torch.compile`: the library's convolutions; norm, activation and sums fused into pooling and into selection."""
    m = spec.num_branches
    steps = (
        Step(CONVOLUTION, SPLIT, m, m),
        Step("pool", FUSE, m, 0),
        Step("select", SELECT, m, 1),
    )
    return Route(source, "torch.compile", steps)


def library(spec: SKSpec) -> Route:
    """The library's convolutions; shifts and activations wherever a convolution is read: to pool, and to select."""
    return Route("ours-library", "sk_triton, library", compiled(spec, "").steps)


def store(spec: SKSpec) -> Route:
    """Branches of the same groups share one read of the input; each is written once, pooled on the way, read once."""
    m = spec.num_branches
    steps = (
        Step("conv, pool", SPLIT, _reads(spec), m),
        Step("select", SELECT, m, 1),
    )
    return Route("ours-store", "sk_triton, store", steps)


def recompute(spec: SKSpec) -> Route:
    """The first launch keeps pooled sums only; the second convolves again and selects."""
    steps = (
        Step("pool", FUSE, _reads(spec), 0),
        Step("select", SELECT, _reads(spec), 1),
    )
    return Route("ours-recompute", "sk_triton, recompute", steps)


def resident(spec: SKSpec) -> Route:
    """As `recompute` in one launch: the second read of the input meets it in L2."""
    return Route("ours-resident", "sk_triton, resident", (Step("unit", SELECT, _reads(spec), 1),))


def merged(spec: SKSpec) -> Route:
    """Sums of the input give the gate, then one convolution with a kernel per sample.

    Raises:
        ValueError: the branches are not linear.
    """
    if not spec.is_linear:
        raise ValueError("spec must have linear branches (no norm, no activation) for schedule merged")
    steps = (Step("pool", FUSE, _reads(spec), 0), Step("conv", SELECT, _reads(spec), 1))
    return Route("ours-merged", "sk_triton, merged", steps)


def routes(spec: SKSpec) -> list[Route]:
    """The ways to compute a unit at inference, peers first: the classic class's where branches are linear, else the
    paper's."""
    if spec.is_linear:
        ours = [library(spec), store(spec), recompute(spec), merged(spec)]
        return [classic_class(spec), compiled(spec, "classic"), *ours]
    ours = [library(spec), store(spec), recompute(spec), resident(spec)]
    return [timm_module(spec), plain_paper(spec), compiled(spec, "paper"), *ours]


def _through_one_tensor(spec: SKSpec, copy: str) -> tuple[Step, ...]:
    """Branches copied into one tensor `[N, M, C, H, W]`, which is summed, weighted and summed again."""
    m = spec.num_branches
    return (
        *_eager_branches(spec),
        Step(copy, FUSE, m, m),
        Step("sum", FUSE, m, 1),
        Step("mean", FUSE, 1, 0),
        Step("weigh", SELECT, m, m),
        Step("sum", SELECT, m, 1),
    )


def _eager_branches(spec: SKSpec) -> tuple[Step, ...]:
    m = spec.num_branches
    steps = [Step(CONVOLUTION, SPLIT, m, m)]
    if spec.branch_norm:
        steps.append(Step("norm", SPLIT, m, m))
    if spec.branch_act != "identity":
        steps.append(Step("act", SPLIT, m, m))
    return tuple(steps)


def _reads(spec: SKSpec) -> int:
    """Times that all branches together read the input: once for each run of branches with the same groups."""
    return len(list(groupby(branch.groups for branch in spec.branches)))
