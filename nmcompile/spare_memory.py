"""Reuse of freed memory for large results. The process keeps at most as much as was in use at one time."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from nmcompile.native import MISSING, kernels

LARGE = 1 << 22  # bytes; the C library returns larger blocks to the system, or takes long to find one


def empty_like(x: Tensor) -> Tensor:
    """Return `torch.empty_like(x, requires_grad=False)`, in spare memory if it is large."""
    is_large = x.numel() * x.itemsize >= LARGE
    return empty(x, torch.empty_like(x, device="meta")) if is_large else torch.empty_like(x, requires_grad=False)


def empty(x: Tensor, shape: Tensor) -> Tensor:
    """Return a tensor with dtype and device of `x`, sizes and strides of `shape`, in spare memory if it is large."""
    if MISSING or not x.is_cpu or isinstance(x, FakeTensor) or shape.numel() * x.itemsize < LARGE:
        return torch.empty_strided(shape.shape, shape.stride(), dtype=x.dtype, device=x.device)
    memory = kernels.memory(shape.numel() * x.itemsize)
    return x.new_empty(0).set_(memory.untyped_storage(), 0, shape.shape, shape.stride())
