"""The peers written out in plain PyTorch: the classic class, both units in few passes, and SKNet-50."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..shapes import PAPER, STAGES, Shape, unit_shape

MakeUnit = Callable[[Shape], nn.Module]


class ClassicSKConv(nn.Module):
    """The classic `SKConv`: true 3 + 2i kernels with bias, no norm and no activation.

    Its copies are kept on purpose (`cat` of the branches, two means): this is what its users run today.
    Input and output `[N, features, H, W]`.
    """

    def __init__(self, features: int, M: int, G: int, r: int, stride: int = 1, L: int = 32) -> None:
        super().__init__()
        d = max(int(features / r), L)
        self.M = M
        self.features = features
        self.convs = nn.ModuleList(
            nn.Conv2d(features, features, kernel_size=3 + i * 2, stride=stride, padding=1 + i, groups=G)
            for i in range(M)
        )
        self.fc = nn.Linear(features, d)
        self.fcs = nn.ModuleList(nn.Linear(d, features) for _ in range(M))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        feas = torch.cat([conv(x).unsqueeze_(dim=1) for conv in self.convs], dim=1)
        fea_u = torch.sum(feas, dim=1)
        fea_s = fea_u.mean(-1).mean(-1)
        fea_z = self.fc(fea_s)
        attention = torch.cat([fc(fea_z).unsqueeze_(dim=1) for fc in self.fcs], dim=1)
        attention = self.softmax(attention).unsqueeze(-1).unsqueeze(-1)
        return (feas * attention).sum(dim=1)


class ClassicUnit(ClassicSKConv):
    """The classic class's unit in the fewest passes that plain PyTorch allows: no copy of the branches, no sum of them.

    Parameters and arguments are `ClassicSKConv`'s.
    """

    def forward(self, x: Tensor) -> Tensor:
        branches = [conv(x) for conv in self.convs]
        # The mean of the sum is the sum of the means, which writes no tensor of its size.
        pooled = branches[0].mean((2, 3))
        for branch in branches[1:]:
            pooled = pooled + branch.mean((2, 3))
        z = self.fc(pooled)
        weights = self.softmax(torch.stack([fc(z) for fc in self.fcs], dim=1))[..., None, None]
        if self.M == 2:  # the two weights add up to 1: one operator in place of two
            return torch.lerp(branches[1], branches[0], weights[:, 0])
        out = branches[0] * weights[:, 0]
        for i, branch in enumerate(branches[1:], start=1):
            out = torch.addcmul(out, branch, weights[:, i])
        return out


class _ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, dilation: int, groups: int, stride: int
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Gate(nn.Module):
    """Pooled features `[N, C]` to attention `[N, M, C]`."""

    def __init__(self, channels: int, M: int, width: int) -> None:
        super().__init__()
        self.M = M
        self.fc_reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc_select = nn.Conv2d(width, M * channels, 1, bias=False)

    def forward(self, s: Tensor) -> Tensor:
        z = torch.relu(self.bn(self.fc_reduce(s[:, :, None, None])))
        return self.fc_select(z).view(s.shape[0], self.M, -1).softmax(dim=1)


class PaperUnit(nn.Module):
    """The paper's unit in the fewest passes that plain PyTorch allows: no stacked copy of the branches.

    Branch m has kernel `kernels[m]` and dilation `dilations[m]`, batch norm and ReLU; with `split_input` it reads the
    m-th slice of the channels. Parameter names are timm's `SelectiveKernel`'s.

    Input `[N, channels, H, W]`, output `[N, channels, H', W']`.
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int] = (3, 3),
        dilations: Sequence[int] = (1, 2),
        groups: int = 32,
        gate_width: int = 32,
        stride: int = 1,
        split_input: bool = False,
    ) -> None:
        super().__init__()
        self.split_channels = channels // len(kernels) if split_input else None
        self.paths = nn.ModuleList(
            _ConvNorm(self.split_channels or channels, channels, kernel, dilation, groups, stride)
            for kernel, dilation in zip(kernels, dilations, strict=True)
        )
        self.attn = _Gate(channels, len(kernels), gate_width)

    def forward(self, x: Tensor) -> Tensor:
        if self.split_channels is None:
            branches = [path(x) for path in self.paths]
        else:
            parts = x.split(self.split_channels, dim=1)
            branches = [path(part) for path, part in zip(self.paths, parts, strict=True)]
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        weights = self.attn(total.mean((2, 3)))[..., None, None]
        out = branches[0] * weights[:, 0]
        for i, branch in enumerate(branches[1:], start=1):
            out = torch.addcmul(out, branch, weights[:, i])
        return out


class _Bottleneck(nn.Module):
    """1x1 to `width` channels, the unit, 1x1 to twice as many, and the shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, make_unit: MakeUnit) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = make_unit(replace(unit_shape(PAPER, width, 0), stride=stride))
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != 2 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return torch.relu(self.bn3(self.conv3(x)) + shortcut)


class SKNet50(nn.Module):
    """SKNet-50 (paper, table 1) around the units that `make_unit(shape)` builds.

    Input `[N, 3, H, W]`, output `[N, 1000]`.
    """

    DEPTHS = (3, 4, 6, 3)

    def __init__(self, make_unit: MakeUnit) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for stage, depth in enumerate(self.DEPTHS, start=1):
            width, _ = STAGES[stage]
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(_Bottleneck(channels, width, stride, make_unit))
                channels = 2 * width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(x).mean((2, 3)))
