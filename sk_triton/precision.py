"""How exact PyTorch's own switches want products to be."""

from __future__ import annotations

import torch


def allows_tf32() -> bool:
    """Whether PyTorch's own switches let fp32 convolutions round their operands to TF32; never on ROCm."""
    if torch.version.hip:
        return False
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is None or precision == "none":
        return torch.backends.cudnn.allow_tf32
    return precision == "tf32"
