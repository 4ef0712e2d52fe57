"""Memory formats of ``[N, C, H, W]`` tensors."""

import torch
from torch import Tensor

from .kernels.geometry import pixel_stride
from .spec import SKSpec


def memory_format(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` where x ``[N, C, H, W]`` is laid out so, else ``torch.contiguous_format``."""
    # A view, such as a crop, is dense in no format: the order of its strides tells. A single channel or pixel
    # reads as both formats and counts as contiguous.
    _, channels, height, width = x.shape
    _, channel_stride, row_stride, column_stride = x.stride()
    between_pixels = column_stride if width > 1 else row_stride
    if channels > 1 and height * width > 1 and 0 < channel_stride < between_pixels:
        return torch.channels_last
    return torch.contiguous_format


def with_own_strides(x: Tensor) -> Tensor:
    """x with the strides of its memory format, where sizes of one leave them arbitrary: PyTorch's weight gradients of
    grouped convolutions go wrong with others (2.14, without oneDNN)."""
    own = memory_format(x)
    if 1 not in x.shape or not x.is_contiguous(memory_format=own):
        return x
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta", memory_format=own).stride())


def branch_inputs(x: Tensor, spec: SKSpec) -> list[Tensor]:
    """What each of the M branches reads of x: all of it, or its slice of the channels."""
    if spec.split_input:
        return list(x.split(spec.branch_in_channels, dim=1))
    return [x] * spec.num_branches


def empty_output(x: Tensor, spec: SKSpec) -> Tensor:
    """``[N, C, H', W']`` in the dtype and memory format of x, without values."""
    size = (x.shape[0], spec.out_channels, *spec.output_size(*x.shape[2:]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def with_adjacent_channels(x: Tensor) -> Tensor:
    """x itself where its channels are adjacent, else a channels_last copy: the one conversion that NCHW input costs."""
    if x.stride(1) == 1:
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    # The stride of a single channel is arbitrary.
    return x.as_strided(x.shape, (x.stride(0), 1, x.stride(2), x.stride(3)))


def with_spaced_pixels(dv: Tensor) -> Tensor:
    """dv itself where its channels are adjacent and its pixels equally spaced, else a channels_last copy."""
    if dv.stride(1) == 1 and pixel_stride(dv):
        return dv
    return with_adjacent_channels(dv.contiguous(memory_format=torch.channels_last))
