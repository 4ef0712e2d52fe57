"""Memory formats of ``[N, C, H, W]`` tensors."""

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` where x ``[N, C, H, W]`` is laid out so, else ``torch.contiguous_format``."""
    # A view, such as a crop, is dense in no format: the order of its strides tells. A single channel or pixel
    # reads as both formats and counts as contiguous.
    _, channels, height, width = x.shape
    _, channel_stride, row_stride, column_stride = x.stride()
    pixel_stride = column_stride if width > 1 else row_stride
    if channels > 1 and height * width > 1 and 0 < channel_stride < pixel_stride:
        return torch.channels_last
    return torch.contiguous_format
