"""The masked weight that dense kernels read.

`torch.where` branches at each element, which a processor cannot predict; the native kernel takes the bits.
"""

import torch
from torch import Tensor

from nmcompile.backends.cpu.kernels import takes
from nmcompile.backends.cpu.spare_memory import empty_like
from nmcompile.ir.operations import apply_mask
from nmcompile.native import kernels
from nmcompile.weight_cache import FROZEN, content_at_rest


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weight where the mask holds, else zero; cached for the weight of a frozen model."""
    if mask is None:
        return weight
    if content_at_rest() == FROZEN or not takes(weight) or weight.is_neg():
        return apply_mask(weight, mask)
    result = empty_like(weight)
    if not weight.stride() == mask.stride() == result.stride():
        return apply_mask(weight, mask)
    sizes = weight.numel(), weight.itemsize
    kernels.write_masked(weight.data_ptr(), mask.data_ptr(), result.data_ptr(), *sizes, torch.get_num_threads())
    return result
