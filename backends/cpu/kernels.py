"""Whether the native kernels are there, and what tensors they take."""

import functools

import torch
from torch import Tensor

from nmcompile.ir.protocols import Support

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@functools.cache
def kernel_support() -> Support:
    """Whether the compiled module is there; never raises."""
    try:
        from nmcompile import _kernels
    except ImportError as error:
        return Support(False, f"nmcompile._kernels cannot be imported ({error}); reinstall nmcompile with a compiler")
    return Support(True, f"native kernels for blocks of at most {_kernels.MAX_BLOCK} elements")


def takes(x: Tensor) -> bool:
    """Whether the kernels take tensors like `x`. Wrong operands are refused too: the references say what is wrong."""
    return x.device.type == "cpu" and x.layout == torch.strided and x.dtype in DTYPES and kernel_support().ok
