"""How exact PyTorch's own switches want products to be."""

from __future__ import annotations

import torch


def allows_tf32() -> bool:
    """Whether PyTorch's own switches let fp32 convolutions round their operands to TF32; never on ROCm."""
    if torch.version.hip:
        return False
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    if precision is None:  # torch before 2.9
        return torch.backends.cudnn.allow_tf32
    # Once precisions were set by this switch, reading `allow_tf32` may raise.
    return bool(precision == "tf32")
