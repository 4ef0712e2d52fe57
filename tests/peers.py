"""Classes of others, written anew from their documents, to compare results and checkpoints with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassicSKConv(nn.Module):
    """The classic ``SKConv``: bare branches of kernel 3, 5, 7, ..., a gate with biases and no act."""

    def __init__(self, features: int, M: int, G: int, r: float, stride: int = 1, L: int = 32):
        super().__init__()
        d = max(int(features / r), L)
        self.convs = nn.ModuleList(
            self.branch(
                nn.Conv2d(features, features, kernel_size=3 + i * 2, stride=stride, padding=1 + i, groups=G)
            )
            for i in range(M)
        )
        self.fc = nn.Linear(features, d)
        self.fcs = nn.ModuleList(nn.Linear(d, features) for _ in range(M))
        self.softmax = nn.Softmax(dim=1)

    def branch(self, conv: nn.Conv2d) -> nn.Module:
        return conv

    def forward(self, x: Tensor) -> Tensor:
        feas = torch.cat([conv(x).unsqueeze_(dim=1) for conv in self.convs], dim=1)
        fea_u = torch.sum(feas, dim=1)
        fea_s = fea_u.mean(-1).mean(-1)
        fea_z = self.fc(fea_s)
        vectors = torch.cat([fc(fea_z).unsqueeze_(dim=1) for fc in self.fcs], dim=1)
        vectors = self.softmax(vectors).unsqueeze(-1).unsqueeze(-1)
        return (feas * vectors).sum(dim=1)


class WrappedClassicSKConv(ClassicSKConv):
    """The same with each convolution in a container: keys ``convs.{i}.0.{weight,bias}``."""

    def branch(self, conv: nn.Conv2d) -> nn.Module:
        return nn.Sequential(conv)


class NormedClassicSKConv(ClassicSKConv):
    """pppLang's class: batch norm and ReLU follow each convolution, keys ``convs.{i}.1.*``."""

    def branch(self, conv: nn.Conv2d) -> nn.Module:
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=False))
