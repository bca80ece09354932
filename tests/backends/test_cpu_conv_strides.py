"""A convolution of the CPU backend has the memory layout of eager's, whatever the layout of its operands."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from nmcompile.backends.cpu import conv

CHANNELS_LAST = torch.channels_last
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "spatial dims last": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second column": lambda x: torch.cat([x, x], -1)[..., ::2],
    "channels last": lambda x: x.contiguous(memory_format=CHANNELS_LAST) if x.dim() == 4 else x,
    "half of channels last": lambda x: (
        torch.cat([x, x], 1).to(memory_format=CHANNELS_LAST)[:, ::2] if x.dim() == 4 else x
    ),
    "expanded": lambda x: x[:, :1].expand_as(x),
}
SIZES = (5,), (1,), (5, 6), (1, 1), (1, 5), (5, 1)


@pytest.mark.parametrize("spatial", SIZES)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_strides_are_those_of_eager(batch: int, spatial: tuple[int, ...]) -> None:
    dims = len(spatial)
    eager = (F.conv1d, F.conv2d)[dims - 1]
    for (channels, groups), kernel, stride in product(((1, 1), (8, 1), (8, 2)), (1, 3), (1, 2)):
        geometry = [stride] * dims, [kernel // 2] * dims, [1] * dims, groups
        x, w = torch.randn(batch, channels, *spatial), torch.randn(8, channels // groups, *(kernel,) * dims)
        for lay_input, lay_weight in product(LAYOUTS.values(), LAYOUTS.values()):
            input, weight = lay_input(x), lay_weight(w)
            expected = eager(input, weight, None, *geometry)
            ours = conv.conv_forward(input, weight, None, None, *geometry, "a call")
            assert torch.equal(ours, expected)
            assert ours.stride() == expected.stride(), (input.stride(), weight.stride(), geometry)


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_one_unbatched_image_is_laid_out_as_traced(lay_out: Callable[[Tensor], Tensor]) -> None:
    x, weight = lay_out(torch.randn(1, 8, 5, 6)), torch.randn(8, 8, 3, 3)
    geometry = [1, 1], [1, 1], [1, 1], 1
    with FakeTensorMode() as mode:
        traced = conv.conv_forward(mode.from_tensor(x), mode.from_tensor(weight), None, None, *geometry, "a call")
    assert traced.stride() == F.conv2d(x, weight, None, *geometry).stride()
