"""Common parts of all launches: integer views of tensors, keys, the operators' draws, and compile options."""

from types import MappingProxyType

import torch
import triton.language as tl
from torch import Tensor

TYPES = MappingProxyType({torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16})
DRAWS = MappingProxyType({"greedy": 0, "greedy_by_value": 0, "mvue": 1, "mvue_approx": 2})
LARGEST_INT32 = 2**31 - 1
OPTIONS = MappingProxyType({"num_warps": 4, "enable_fp_fusion": False})
"""Options without contraction: a contracted a * b + c rounds once where the reference operators round twice."""


def words(x: Tensor) -> Tensor:
    """View `x` as the integers that memory holds."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def key_on(device: torch.device, key: Tensor | None) -> Tensor | None:
    """Move the key to the kernel's device: no number crosses to the host, so nothing waits for the GPU."""
    return None if key is None else key.to(device)


def needs_int64(*tensors: Tensor) -> bool:
    """Return whether an offset into one of the tensors may exceed 32 bits."""
    return any(_reach(x) > LARGEST_INT32 // 2 for x in tensors)


def _reach(x: Tensor) -> int:
    return sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
