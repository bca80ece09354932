"""Requirements of the kernels on machine and operands, checked without importing Triton."""

import importlib.util
import os

import torch
from torch import Tensor

from nmcompile.ir.protocols import Support
from nmcompile.pruning.pattern import NMPattern

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
PATTERNS = {"greedy": None, "greedy_by_value": None, "mvue": None, "mvue_approx": "2:4"}
"""Operators that have kernels, each with its one pattern; `None` is any N:M with M <= MAX_BLOCK."""
KEEP = "keep"
"""Operator name that packing kernels take if the operand is pruned already."""
MAX_BLOCK = 8  # code grows with the square of M: a block is unrolled
OLDEST = (8, 0)


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which takes CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    """Return whether kernels take tensors on a device."""
    return device.type == "cuda" or (device.type == "cpu" and is_interpreted())


def triton_support() -> Support:
    """Return whether kernels can run on this machine; never raise."""
    if importlib.util.find_spec("triton") is None:
        return Support(False, "Triton is not installed; install it with `pip install triton`")
    if is_interpreted():
        return Support(True, "Triton's interpreter, since TRITON_INTERPRET is 1")
    if not torch.cuda.is_available():
        return Support(False, "no CUDA device, or a torch without CUDA")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return Support(False, f"{torch.cuda.get_device_name()} has compute capability {capability}, below {OLDEST}")
    return Support(True, f"Triton kernels on {torch.cuda.get_device_name()}")


def operator_support(operator: str, pattern: NMPattern) -> Support:
    """Return whether an operator has a kernel for a pattern."""
    if operator not in PATTERNS:
        return Support(False, f"no Triton kernel for operator {operator!r}, only for {', '.join(PATTERNS)}")
    only = PATTERNS[operator]
    if only is not None and str(pattern) != only:
        return Support(False, f"the Triton kernel of {operator!r} takes {only}, not {pattern}")
    if pattern.block > MAX_BLOCK:
        return Support(False, f"blocks of {pattern.block} elements; the Triton kernels take at most {MAX_BLOCK}")
    return Support(True, "one pass over the operand")


def tensor_runs(x: Tensor) -> bool:
    """Return whether a kernel takes this tensor; wrong operands are left to the reference, which raises its error."""
    return runs_on(x.device) and x.dtype in DTYPES and x.layout == torch.strided and x.numel() > 0
