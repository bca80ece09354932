"""The operands that cuSPARSELt takes, as far as this is known without a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.library import SONAME, library_loads, library_version
from nmcompile.ir.protocols import Support

OLDEST = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)
SPARSE_MULTIPLE = 64  # for both sizes of the sparse operand: the library needs 16, and orders indices in tiles of 64
DENSE_MULTIPLE = 8  # for the free size of the dense operand
KNOWN_BAD = {(0, 8, 0): "slower than others on Hopper and L4; nvidia-cusparselt-cu13 0.8.1 and later are not"}
HOPPER = 9


class Sizes(NamedTuple):
    """Sizes of a product of a sparse (rows, depth) and a dense (lanes, depth) operand."""

    rows: int
    depth: int
    lanes: int


def padded(sizes: Sizes) -> Sizes:
    """Return the sizes with the zeros that cuSPARSELt needs appended."""
    multiples = SPARSE_MULTIPLE, SPARSE_MULTIPLE, DENSE_MULTIPLE
    return Sizes(*(-(-size // multiple) * multiple for size, multiple in zip(sizes, multiples, strict=True)))


def cusparselt_support() -> Support:
    """Return whether the library can run on this machine, with its version; never raise."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return Support(False, "no NVIDIA GPU, or a torch without CUDA")
    if not torch.backends.cusparselt.is_available():
        return Support(False, "this torch was built without cuSPARSELt")
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return Support(False, f"{torch.cuda.get_device_name()} has compute capability {capability}, below {OLDEST}")
    if not library_loads():
        return Support(False, f"{SONAME}, which PyTorch is built for, cannot be loaded")
    version = library_version()
    text, known_bad = ".".join(map(str, version)), KNOWN_BAD.get(version)
    return Support(True, f"cuSPARSELt {text}" + (f", {known_bad}" if known_bad else ""))


def operand_refusal(*operands: Tensor) -> str:
    """Return why these tensors cannot be multiplied here; empty if they can."""
    for x in operands:
        if x.device.type != "cuda":
            return f"an operand is on {x.device.type}, not on cuda"
        if x.dtype not in DTYPES:
            return f"no sparse tensor cores for {x.dtype}; use autocast to float16 or bfloat16"
        if x.numel() == 0:
            return "an operand is empty"
        if (x.dtype, x.device) != (operands[0].dtype, operands[0].device):
            return f"operands are {operands[0].dtype} on {operands[0].device} and {x.dtype} on {x.device}"
    if operands[0].dtype == torch.float16:
        return float16_refusal(torch.cuda.get_device_capability(operands[0].device))
    return ""


def float16_refusal(capability: tuple[int, int]) -> str:
    """Return why float16 is refused; empty if it is not. A kernel that ends the process cannot be tried and caught."""
    if capability[0] != HOPPER:
        return ""
    return "a float16 kernel of cuSPARSELt 0.8.0 ends the process on Hopper, later ones were not tried; use bfloat16"
