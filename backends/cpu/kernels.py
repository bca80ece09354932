"""Whether the native kernels are there, and what tensors they take."""

import torch
from torch import Tensor

from nmcompile.ir.protocols import Support
from nmcompile.native import MISSING, kernels

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def kernel_support() -> Support:
    """Whether the compiled module is there; never raises."""
    if MISSING:
        return Support(False, f"nmcompile._kernels cannot be imported ({MISSING}); reinstall nmcompile with a compiler")
    return Support(True, f"native kernels for blocks of at most {kernels.MAX_BLOCK} elements")


def takes(x: Tensor) -> bool:
    """Whether the kernels take tensors like `x`. Wrong operands are refused too: the references say what is wrong."""
    return x.device.type == "cpu" and x.layout == torch.strided and x.dtype in DTYPES and not MISSING
