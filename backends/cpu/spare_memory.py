"""Large fresh results in memory that an earlier one has left."""

import torch
from torch import Tensor

from nmcompile.backends.cpu.kernels import takes

LARGE = 1 << 25  # bytes; glibc maps what is larger from the system each time, and keeps what is smaller itself


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like(x, requires_grad=False)`. The memory of one large result stays with the process."""
    if not takes(x) or x.nbytes < LARGE:
        return torch.empty_like(x, requires_grad=False)
    from nmcompile import _kernels

    strides = torch.empty_like(x, device="meta").stride()
    return x.new_empty(0).set_(_kernels.memory(x.nbytes).untyped_storage(), 0, x.shape, strides)
