"""Variants of the classic class that ports have, to compare results and checkpoints with."""

from __future__ import annotations

from typing import Any

from torch import nn

from sk_triton.bench.measuring.peers import ClassicSKConv


class WrappedClassicSKConv(ClassicSKConv):
    """The same with each convolution in a container: keys ``convs.{i}.0.{weight,bias}``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.convs = nn.ModuleList(nn.Sequential(conv) for conv in self.convs)


class NormedClassicSKConv(ClassicSKConv):
    """pppLang's class: batch norm and ReLU follow each convolution, keys ``convs.{i}.1.*``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.convs = nn.ModuleList(
            nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=False))
            for conv in self.convs
        )
