"""The layers: modules that own the parameters of a unit and hand them to the functional path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from .blocks import (
    ConvPath,
    FoldedNorm,
    GateLayers,
    check_conv_settings,
    conv_settings,
    fold_into,
    unfoldable_reason,
    weight_and_bias,
)
from .checks import act_name
from .params import Branch, Gate
from .reasons import FOLDABLE_NORMS
from .spec import (
    BranchSpec,
    SKSpec,
    make_divisible,
    require_bool,
    require_divides,
    require_int,
    require_odd_kernel,
    require_positive,
)
from .spec import gate_width as paper_gate_width
from .unit import SKUnit

_MAX_BRANCHES = 8


class SKConv(SKUnit):
    """Selective-kernel convolution with bare branches: kernels 3, 5, 7, ... with bias, no norm or activation.

    Branch i has kernel 3 + 2 i and padding 1 + i; the gate is two fully connected layers with bias. Keys of
    the ``state_dict``: ``convs.{i}``, ``fc`` and ``fcs.{i}``, each with ``weight`` and ``bias``; branches
    under ``convs.{i}.0`` load as well.

    Args:
        features: channels of input and output.
        M: number of branches, at most 8.
        G: groups of every branch's convolution.
        r: reduction of the gate's width, ``d = max(int(features / r), L)``.
        stride: stride of the branches.
        L: least width of the gate.
        gate_width: d itself, in place of r and L.
        device, dtype: of the parameters.

    Shape:
        ``[N, features, H, W]`` -> ``[N, features, H', W']``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: M, G, r, stride, L or gate_width out of range, or G does not divide features.
    """

    def __init__(
        self,
        features: int,
        M: int,
        G: int,
        r: float,
        stride: int = 1,
        L: int = 32,
        *,
        gate_width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in {"features": features, "M": M, "G": G, "stride": stride, "L": L}.items():
            require_int(name, value)
        if M > _MAX_BRANCHES:
            raise ValueError(
                f"M must be at most {_MAX_BRANCHES} (kernels 3, 5, ... {3 + 2 * (_MAX_BRANCHES - 1)}), got {M}: other "
                "classes of this name take WH, the image's size, before M; here it is left out"
            )
        require_divides("G", G, "features", features)
        require_positive("r", r)
        if gate_width is None:
            gate_width = paper_gate_width(features, r, L)
        else:
            require_int("gate_width", gate_width)
        super().__init__()
        self.features, self.M, self.G, self.r, self.L = features, M, G, r, L
        self.spec = SKSpec(
            features,
            features,
            tuple(BranchSpec(3 + 2 * i, groups=G) for i in range(M)),
            stride=stride,
            branch_bias=True,
            branch_norm=False,
            branch_act="identity",
            gate_width=gate_width,
            gate_bias=True,
            gate_norm=False,
            gate_act="identity",
            select_bias=True,
        )
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convs = nn.ModuleList(
            nn.Conv2d(
                features, features, b.kernel_size, stride=stride, padding=b.padding, groups=G, **placement
            )
            for b in self.spec.branches
        )
        self._built = [conv_settings(conv) for conv in self.convs]
        self.fc = nn.Linear(features, gate_width, **placement)
        self.fcs = nn.ModuleList(nn.Linear(gate_width, features, **placement) for _ in range(M))

    def branches(self) -> tuple[Branch, ...]:
        found = []
        for i, (conv, built) in enumerate(zip(self.convs, self._built, strict=True)):
            found.append(Branch(*weight_and_bias(f"convs.{i}", conv)))
            check_conv_settings(f"convs.{i}", conv, built)
        return tuple(found)

    def gate(self) -> Gate:
        select = (weight_and_bias(f"fcs.{i}", fc) for i, fc in enumerate(self.fcs))
        weights, biases = zip(*select, strict=True)
        return Gate(*weight_and_bias("fc", self.fc), None, None, weights, biases)

    def extra_repr(self) -> str:
        return (
            f"{self.features}, M={self.M}, G={self.G}, r={self.r}, stride={self.spec.stride}, L={self.L}, "
            f"gate_width={self.spec.gate_width}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Ports of this class wrap each convolution as convs.{i}.0, most with a batch norm as convs.{i}.1.
        convs = f"{prefix}convs."
        norms = tuple(f"{convs}{i}.1." for i in range(self.M))
        norm = next((key for key in state_dict if key.startswith(norms)), None)
        if norm is not None:
            error_msgs.append(
                f"SKConv has no batch norm, but the state_dict has {norm!r}: "
                "only keys convs.{i}.{weight,bias} or convs.{i}.0.{weight,bias} load"
            )
        else:
            for i in range(self.M):
                for name in ("weight", "bias"):
                    wrapped = f"{convs}{i}.0.{name}"
                    # Beside the plain key it stays, an unexpected one.
                    if wrapped in state_dict and f"{convs}{i}.{name}" not in state_dict:
                        state_dict[f"{convs}{i}.{name}"] = state_dict.pop(wrapped)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class SelectiveKernel(SKUnit):
    """Selective-kernel convolution with batch norm and ReLU: timm's ``SelectiveKernel``, or the paper's unit.

    Same signature, results, initialisation and ``state_dict`` keys as timm 1.0's; besides, ``kernel_size``
    may be a tuple and ``norm_layer`` any callable that returns a module.
    ``SelectiveKernel(c, groups=32, split_input=False, min_channels=32)`` is the paper's unit.

    Args:
        in_channels, out_channels: channels; ``out_channels`` is ``in_channels`` unless given.
        kernel_size: odd kernels >= 3, one for each branch; an int gives two equal branches, None (3, 5).
        stride: 1 or 2, or more together with ``aa_layer``.
        dilation: of every branch.
        groups: of every branch's convolution, at most ``out_channels``.
        rd_ratio, rd_divisor: gate width ``make_divisible(out_channels * rd_ratio, rd_divisor)``.
        rd_channels: the gate width itself.
        keep_3x3: a branch of kernel k is a 3x3 of dilation ``dilation * (k - 1) // 2``, as in the paper.
        split_input: each branch reads its own slice of the input channels.
        act_layer, norm_layer: of the branches, not of the gate, which has batch norm and ReLU always;
            ``act_layer`` may be None for no activation.
        aa_layer: with a stride above 1 the convolutions have stride 1 and ``aa_layer(channels=, stride=)``
            follows.
        drop_layer: called without arguments; acts between norm and activation.
        device, dtype: of the parameters.
        gate_width: the gate width itself, under the name that :class:`SKConv` gives it.
        min_channels: the paper's L, gate width ``max(int(out_channels * rd_ratio), min_channels)`` (Eq. 4).

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, out_channels, H', W']``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, channels that do not divide into branches or groups, or more
            than one of ``rd_channels``, ``gate_width`` and ``min_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] | None = None,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        rd_ratio: float = 1.0 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        keep_3x3: bool = True,
        split_input: bool = True,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        aa_layer: Callable[..., nn.Module] | None = None,
        drop_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate_width: int | None = None,
        min_channels: int | None = None,
    ) -> None:
        out_channels = in_channels if out_channels is None else out_channels
        require_int("in_channels", in_channels)
        require_int("out_channels", out_channels)
        require_int("stride", stride)
        require_int("dilation", dilation)
        require_int("groups", groups)
        require_bool("keep_3x3", keep_3x3)
        require_bool("split_input", split_input)
        if stride > 2 and aa_layer is None:
            # timm pads by (stride - 1) // 2 more than "same" there, which shifts the output.
            raise ValueError(f"stride must be 1 or 2, or more together with aa_layer, got {stride}")
        kernels = _kernel_sizes(kernel_size)
        groups = min(out_channels, groups)
        branch_in, of = in_channels, "in_channels"
        if split_input:
            require_divides("the number of branches (split_input)", len(kernels), "in_channels", in_channels)
            branch_in, of = in_channels // len(kernels), "in_channels / number of branches"
        require_divides("groups", groups, of, branch_in)
        require_divides("groups", groups, "out_channels", out_channels)
        width = _gate_width(out_channels, rd_ratio, rd_channels, rd_divisor, gate_width, min_channels)

        super().__init__()
        self.num_paths = len(kernels)
        self.in_channels, self.out_channels, self.split_input = in_channels, out_channels, split_input
        specs = tuple(
            BranchSpec(3, dilation * (k - 1) // 2, groups) if keep_3x3 else BranchSpec(k, dilation, groups)
            for k in kernels
        )
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        self.paths = nn.ModuleList(
            ConvPath(
                branch_in, out_channels, spec, stride, act_layer, norm_layer, aa_layer, drop_layer, placement
            )
            for spec in specs
        )
        self.attn = GateLayers(out_channels, self.num_paths, width, placement)
        self.spec = SKSpec(
            in_channels,
            out_channels,
            specs,
            stride=stride if aa_layer is None else 1,
            split_input=split_input,
            branch_act=act_name(self.branches()[0].act),
            gate_width=width,
        )

    def branches(self) -> tuple[Branch, ...]:
        paths = cast("Iterable[ConvPath]", self.paths)
        return tuple(path.branch(f"paths.{i}") for i, path in enumerate(paths))

    def gate(self) -> Gate:
        return self.attn.gate("attn")

    def _fuse(self) -> None:
        if isinstance(self.attn.bn, FoldedNorm):
            return
        paths = enumerate(cast("Iterable[ConvPath]", self.paths))
        parts: list[tuple[str, Any, nn.Conv2d]] = [(f"paths.{i}.conv", path, path.conv) for i, path in paths]
        parts.append(("attn.fc_reduce", self.attn, self.attn.fc_reduce))
        if len({id(conv) for _, _, conv in parts}) < len(parts):
            raise ValueError("cannot fuse: branches share a convolution, but not what their norms make of it")
        for name, part, conv in parts:
            if part.bn.training and type(part.bn) in FOLDABLE_NORMS:  # which others may ignore
                raise RuntimeError(f"fuse() is for inference, but the norm of {name} is in training mode")
            if reason := unfoldable_reason(name, conv, part.bn):
                raise ValueError(f"cannot fuse: {reason}")
        for _, part, conv in parts:
            part.bn = fold_into(conv, part.bn)
        self.spec = dataclasses.replace(
            self.spec, branch_norm=False, branch_bias=True, gate_norm=False, gate_bias=True
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        is_fused = not self.spec.gate_norm
        is_from_fused = f"{prefix}attn.fc_reduce.bias" in state_dict
        where = f"{prefix.rstrip('.')}: " if prefix else ""
        # Also without strict: the weights of one kind are wrong for the other.
        if is_fused and f"{prefix}attn.bn.running_mean" in state_dict:
            error_msgs.append(
                f"{where}the layer is fused, the state_dict is not: load it first, then call fuse()"
            )
        elif is_from_fused and not is_fused:
            error_msgs.append(
                f"{where}the state_dict is of a fused layer: call layer.eval().fuse(), then load it"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        spec = self.spec
        branches = ", ".join(map(str, spec.branches))
        return (
            f"{spec.in_channels}, {spec.out_channels}, branches=({branches}), stride={spec.stride}, "
            f"split_input={spec.split_input}, gate_width={spec.gate_width}"
        )


def _kernel_sizes(kernel_size: int | Sequence[int] | None) -> tuple[int, ...]:
    if kernel_size is None:
        return 3, 5
    if isinstance(kernel_size, int):
        kernel_size = (kernel_size, kernel_size)
    if not isinstance(kernel_size, (list, tuple)):
        raise TypeError(f"kernel_size must be an int or a list or tuple of ints, got {kernel_size!r}")
    if not kernel_size:
        raise ValueError(f"kernel_size must hold at least one kernel, got {kernel_size!r}")
    for k in kernel_size:
        if k == 1:
            raise ValueError(
                f"kernel_size must be odd and >= 3 for every branch, got {kernel_size}: a 1x1 branch has "
                "no dilated 3x3 form (sk_triton.functional.sk_conv runs one, by BranchSpec(1) in its SKSpec)"
            )
        require_odd_kernel(k, minimum=3)
    return tuple(kernel_size)


def _gate_width(
    channels: int,
    rd_ratio: float,
    rd_channels: int | None,
    rd_divisor: int,
    gate_width: int | None,
    min_channels: int | None,
) -> int:
    explicit = {"rd_channels": rd_channels, "gate_width": gate_width, "min_channels": min_channels}
    given = {name: value for name, value in explicit.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"at most one of rd_channels, gate_width and min_channels may be given, got {given}")
    for name, value in given.items():
        require_int(name, value)
    if rd_channels is not None or gate_width is not None:
        return next(iter(given.values()))
    require_positive("rd_ratio", rd_ratio)
    if min_channels is not None:
        return max(int(channels * rd_ratio), min_channels)
    require_int("rd_divisor", rd_divisor)
    return make_divisible(channels * rd_ratio, rd_divisor)
