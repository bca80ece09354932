"""The operands that cuSPARSELt takes, as far as this is known without a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.cusparselt.library import Library

SPARSE_MULTIPLE = 64  # for both sizes of the sparse operand: the library orders indices in tiles of 64
DEPTH_MULTIPLE = 16  # for the depth, if the order is found there too: all that the library needs
DENSE_MULTIPLE = 8  # for the free size of the dense operand
HOPPER = 9


class Sizes(NamedTuple):
    """Sizes of a product of a sparse (rows, depth) and a dense (lanes, depth) operand."""

    rows: int
    depth: int
    lanes: int

    @property
    def multiplications(self) -> int:
        return self.rows * self.depth * self.lanes


def padded(sizes: Sizes) -> Sizes:
    """Return the sizes with the zeros that cuSPARSELt needs appended."""
    multiples = SPARSE_MULTIPLE, SPARSE_MULTIPLE, DENSE_MULTIPLE
    return Sizes(*(-(-size // multiple) * multiple for size, multiple in zip(sizes, multiples, strict=True)))


def paddings(sizes: Sizes) -> tuple[Sizes, ...]:
    """Return the padded sizes to try, in this order: a depth that the library takes as it is saves a copy of X."""
    whole = padded(sizes)
    unpadded = whole._replace(depth=sizes.depth)
    return (whole,) if sizes.depth % DEPTH_MULTIPLE or whole == unpadded else (unpadded, whole)


def operand_refusal(library: Library, *operands: Tensor) -> str:
    """Return why these tensors cannot be multiplied here; empty if they can."""
    for x in operands:
        if x.device.type != library.device_type:
            return f"an operand is on {x.device.type}, not on {library.device_type}"
        if x.dtype not in library.dtypes:
            return f"no sparse tensor cores for {x.dtype}; use autocast to float16 or bfloat16"
        if x.numel() == 0:
            return "an operand is empty"
        if (x.dtype, x.device) != (operands[0].dtype, operands[0].device):
            return f"operands are {operands[0].dtype} on {operands[0].device} and {x.dtype} on {x.device}"
    if operands[0].is_cuda and operands[0].dtype == torch.float16:
        return float16_refusal(torch.cuda.get_device_capability(operands[0].device))
    return ""


def float16_refusal(capability: tuple[int, int]) -> str:
    """Return why float16 is refused; empty if it is not. A kernel that ends the process cannot be tried and caught."""
    if capability[0] != HOPPER:
        return ""
    return "a float16 kernel of cuSPARSELt 0.8.0 ends the process on Hopper, later ones were not tried; use bfloat16"
