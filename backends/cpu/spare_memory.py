"""Large fresh results in memory that an earlier one has left."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nmcompile.backends.cpu.kernels import takes

LARGE = 1 << 22  # bytes; the C library gives more than that back to the system, or takes long to find it


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x, requires_grad=False)`. The memory of one large result stays with the process."""
    if not takes(x) or x.nbytes < LARGE:
        return torch.empty_like(x, requires_grad=False)
    return _in_spare_memory(x, x.shape, torch.empty_like(x, device="meta").stride())


def new_empty(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """`x.new_empty(sizes)`, in the same way."""
    if not takes(x) or math.prod(sizes) * x.itemsize < LARGE:
        return x.new_empty(sizes)
    return _in_spare_memory(x, sizes, torch.empty(sizes, device="meta").stride())


def _in_spare_memory(x: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    from nmcompile import _kernels

    memory = _kernels.memory(math.prod(sizes) * x.itemsize)
    return x.new_empty(0).set_(memory.untyped_storage(), 0, sizes, strides)
