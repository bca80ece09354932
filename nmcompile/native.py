"""The native kernels, imported only in this file. A pure installation has none; `MISSING` is then the reason."""

import torch

__all__ = ["INSTRUCTION_SETS", "MISSING", "isa_and_threads", "kernels", "lend"]

try:
    from nmcompile import _kernels as kernels
    from nmcompile._kernels import INSTRUCTION_SETS
except ImportError as error:
    kernels, INSTRUCTION_SETS = None, ()  # type: ignore[assignment]
    MISSING = str(error)
else:
    MISSING = ""


# The C function behind a tensor's own `__dlpack__`, which takes ten times as long: most of a kernel on a small tensor.
lend = torch._C._to_dlpack
"""Lend a strided tensor to a kernel, which reads or writes its memory: a DLPack capsule."""


def isa_and_threads() -> tuple[str, int]:
    """Return this machine's best instruction set and torch's number of threads, the last two arguments of kernels."""
    return INSTRUCTION_SETS[0], torch.get_num_threads()
