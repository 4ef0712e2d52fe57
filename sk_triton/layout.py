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


def with_adjacent_channels(x: Tensor) -> Tensor:
    """x itself where its channels are adjacent, else a channels_last copy: the one conversion that NCHW input costs."""
    if x.stride(1) == 1:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    # The stride of a single channel is arbitrary.
    return x.as_strided(x.shape, (x.stride(0), 1, x.stride(2), x.stride(3)))
