"""The frozen description of a selective-kernel unit: shapes and settings, no tensors."""

from __future__ import annotations

import json
import math
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import lru_cache


def require_int(name: str, value: object, minimum: int = 1) -> None:
    """Raise unless ``value`` is an ``int`` of at least ``minimum``.

    Raises:
        TypeError: ``value`` is not an ``int`` (``bool`` does not count as one).
        ValueError: ``value`` is below ``minimum``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int >= {minimum}, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be an int >= {minimum}, got {value}")


def require_positive(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number above 0.

    Raises:
        TypeError: ``value`` is not an ``int`` or ``float``.
        ValueError: ``value`` is not above 0, or infinite.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a finite number > 0, got {value!r} of type {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def require_bool(name: str, value: object) -> None:
    """Raise unless ``value`` is a ``bool``.

    Raises:
        TypeError: ``value`` is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def require_odd_kernel(value: object, minimum: int = 1) -> None:
    """Raise unless a ``kernel_size`` is an odd ``int``: an even kernel has no symmetric "same" padding.

    Raises:
        TypeError: ``value`` is not an ``int``.
        ValueError: ``value`` is even or below ``minimum``.
    """
    require_int("kernel_size", value, minimum)
    if value % 2 == 0:  # type: ignore[operator]
        raise ValueError(
            f"kernel_size must be odd and >= {minimum}, got {value}: the padding of an even kernel is ambiguous"
        )


def require_divides(name: str, value: int, of: str, total: int) -> None:
    """Raise ``ValueError`` unless ``value`` divides ``total``; ``of`` names the total."""
    if total % value:
        raise ValueError(f"{name} must divide {of} = {total}, got {value}")


def gate_width(channels: int, reduction: float, minimum: int = 32) -> int:
    """Width of the gate's hidden layer, ``d = max(C / r, L)`` (Li et al., CVPR 2019, Eq. 4), C / r floored.

    Raises:
        TypeError: ``reduction`` is not a number.
        ValueError: ``reduction`` is not above 0.
    """
    require_positive("reduction", reduction)
    return max(int(channels / reduction), minimum)


def make_divisible(value: float, divisor: int = 8) -> int:
    """Nearest multiple of ``divisor`` to ``value``: at least ``divisor``, and never below 90 % of ``value``.

    The rounding of the MobileNet family, which timm uses for the gate's width.
    """
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * value else nearest + divisor


@dataclass(frozen=True)
class BranchSpec:
    """One branch's convolution, with "same" padding at stride 1.

    Args:
        kernel_size: odd side of the square kernel.
        dilation: distance between taps, in pixels.
        groups: convolution groups.

    Attributes:
        padding: zero padding on each side, in pixels.

    Raises:
        TypeError: an argument is not an ``int``.
        ValueError: an even kernel, or an argument below 1.
    """

    kernel_size: int
    dilation: int = 1
    groups: int = 1
    padding: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_odd_kernel(self.kernel_size)
        require_int("dilation", self.dilation)
        require_int("groups", self.groups)
        object.__setattr__(self, "padding", self.dilation * (self.kernel_size - 1) // 2)

    def __str__(self) -> str:
        text = f"{self.kernel_size}x{self.kernel_size}"
        if self.dilation > 1:
            text += f" d{self.dilation}"
        return text + f" g{self.groups}" if self.groups > 1 else text


@dataclass(frozen=True)
class SKSpec:
    """A selective-kernel unit.

    Args:
        in_channels: channels of the input ``[N, in_channels, H, W]``.
        out_channels: C, the channels of every branch and of the output.
        branches: one :class:`BranchSpec` for each of the M branches.
        stride: stride of the branches' convolutions.
        split_input: branch m reads the m-th of M equal channel slices instead of the whole input.
        branch_bias, branch_norm, branch_act: what follows each branch's convolution. An activation is named:
            "relu", "identity" or another activation's class name (which only the reference runs).
        gate_width: d, the width of the gate's hidden layer.
        gate_bias, gate_norm, gate_act: what follows the gate's first fully connected layer.
        select_bias: whether the layer that gives the branches' logits has a bias.

    Attributes:
        num_branches: M.
        branch_in_channels: channels that each branch reads: ``in_channels``, over M with ``split_input``.
        weight_shapes: shape of each branch's weight, ``[out_channels, branch_in_channels / groups, k, k]``.
        encoded: the spec as text, for operators, which take no objects: :meth:`decode`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or channels that do not divide into slices or groups.
    """

    in_channels: int
    out_channels: int
    branches: tuple[BranchSpec, ...]
    _: KW_ONLY
    stride: int = 1
    split_input: bool = False
    branch_bias: bool = False
    branch_norm: bool = True
    branch_act: str = "relu"
    gate_width: int
    gate_bias: bool = False
    gate_norm: bool = True
    gate_act: str = "relu"
    select_bias: bool = False
    # Derived once: the functional path reads them at every call.
    num_branches: int = field(init=False, repr=False, compare=False)
    branch_in_channels: int = field(init=False, repr=False, compare=False)
    weight_shapes: tuple[tuple[int, int, int, int], ...] = field(init=False, repr=False, compare=False)
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int("in_channels", self.in_channels)
        require_int("out_channels", self.out_channels)
        require_int("stride", self.stride)
        require_int("gate_width", self.gate_width)
        if isinstance(self.branches, list):
            object.__setattr__(self, "branches", tuple(self.branches))
        if not isinstance(self.branches, tuple) or not all(isinstance(b, BranchSpec) for b in self.branches):
            raise TypeError(f"branches must be a tuple of BranchSpec, got {self.branches!r}")
        if not self.branches:
            raise ValueError("branches must hold M >= 1 BranchSpec, got an empty tuple")
        for name in ("split_input", "branch_bias", "branch_norm", "gate_bias", "gate_norm", "select_bias"):
            require_bool(name, getattr(self, name))
        for name in ("branch_act", "gate_act"):
            act = getattr(self, name)
            if not isinstance(act, str) or not act:
                raise TypeError(
                    f"{name} must be the name of an activation ('relu', 'identity', ...), got {act!r}"
                )
        M = len(self.branches)
        if self.split_input:
            require_divides("the number of branches", M, "in_channels", self.in_channels)
        branch_in = self.in_channels // M if self.split_input else self.in_channels
        for m, branch in enumerate(self.branches):
            require_divides(f"branches[{m}].groups", branch.groups, "the branch's input channels", branch_in)
            require_divides(f"branches[{m}].groups", branch.groups, "out_channels", self.out_channels)
        shapes = tuple(
            (self.out_channels, branch_in // b.groups, b.kernel_size, b.kernel_size) for b in self.branches
        )
        object.__setattr__(self, "num_branches", M)
        object.__setattr__(self, "branch_in_channels", branch_in)
        object.__setattr__(self, "weight_shapes", shapes)
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        values["branches"] = [(b.kernel_size, b.dilation, b.groups) for b in self.branches]
        object.__setattr__(self, "encoded", json.dumps(values))

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(encoded: str) -> SKSpec:
        """The spec of an ``encoded`` text."""
        values = json.loads(encoded)
        values["branches"] = tuple(BranchSpec(*branch) for branch in values["branches"])
        return SKSpec(**values)

    @property
    def is_linear(self) -> bool:
        """Whether the branches are bare convolutions: no norm and no activation."""
        return not self.branch_norm and self.branch_act == "identity"

    @property
    def branch_has_relu(self) -> bool:
        """Whether a ReLU follows each branch."""
        return self.branch_act == "relu"

    @property
    def gate_has_relu(self) -> bool:
        """Whether a ReLU stands between the gate's two layers."""
        return self.gate_act == "relu"

    @property
    def group_channels(self) -> int:
        """Channels of the widest group of any branch, inputs or outputs."""
        return max(
            max(self.branch_in_channels, self.out_channels) // branch.groups for branch in self.branches
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the branches' convolutions give for an input of ``height`` x ``width``."""
        # "Same" padding makes kernel and dilation drop out of the usual formula.
        return (height - 1) // self.stride + 1, (width - 1) // self.stride + 1
