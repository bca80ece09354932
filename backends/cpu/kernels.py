"""Availability of the native kernels, and the tensors that they take."""

from functools import cache

import torch
from torch import Tensor

from nmcompile.ir.protocols import Support
from nmcompile.native import MISSING, kernels

DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@cache
def kernel_support() -> Support:
    """Return whether the compiled module is available; never raise."""
    if MISSING:
        return Support(False, f"nmcompile._kernels cannot be imported ({MISSING}); reinstall nmcompile with a compiler")
    return Support(True, f"native kernels for blocks of at most {kernels.MAX_BLOCK} elements")


def takes(x: Tensor) -> bool:
    """Return whether the kernels take tensors like `x`; the references raise the errors for wrong ones."""
    return x.device.type == "cpu" and x.layout == torch.strided and x.dtype in DTYPES and not MISSING
