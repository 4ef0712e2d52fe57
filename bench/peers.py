"""The peers written out in plain PyTorch: the seed document's class and the paper's unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SeedSKConv(nn.Module):
    """The seed document's `SKConv`: true 3 + 2i kernels with bias, no norm and no activation.

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


class _ConvNorm(nn.Module):
    """3x3 convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False
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

    Branch i is a 3x3 convolution of dilation 1 + i with batch norm and ReLU; gate width
    `max(C / r, L)`. Parameter names are timm's `SelectiveKernel`'s. Input and output `[N, channels, H, W]`.
    """

    def __init__(self, channels: int, M: int, G: int, r: int, L: int = 32) -> None:
        super().__init__()
        self.paths = nn.ModuleList(_ConvNorm(channels, 1 + i, G) for i in range(M))
        self.attn = _Gate(channels, M, max(channels // r, L))

    def forward(self, x: Tensor) -> Tensor:
        branches = [path(x) for path in self.paths]
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        weights = self.attn(total.mean((2, 3)))[..., None, None]
        out = branches[0] * weights[:, 0]
        for i, branch in enumerate(branches[1:], start=1):
            out = torch.addcmul(out, branch, weights[:, i])
        return out
