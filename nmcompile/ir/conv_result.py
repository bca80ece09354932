"""Sizes and strides of a convolution's result, which are those of eager's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

Ints = Sequence[int]


def conv_result(input: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    """Return a meta tensor with the sizes and strides of the result of a 1-d or 2-d convolution.

    Eager computes a 1-d convolution as a 2-d one of height 1, and reads its input as a contiguous one.
    """
    spans = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in spans]
    if len(sizes) == 1:
        image = [input.shape[0], weight.shape[0], 1, *sizes]
        return _empty_image(image, _is_channels_last(weight.unsqueeze(2))).squeeze(2)
    is_channels_last = any(_is_channels_last(x) for x in (input, weight))
    return _empty_image([input.shape[0], weight.shape[0], *sizes], is_channels_last)


def _empty_image(sizes: list[int], is_channels_last: bool) -> Tensor:
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(sizes, device="meta", memory_format=layout)


def _is_channels_last(x: Tensor) -> bool:
    """Return whether eager takes an operand for channels last: strides decide if dims of size 1 leave it open."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return False  # the usual case, without arithmetic on strides
    return suggest_memory_format(x) == torch.channels_last
