"""Random operands like those of a call, on which its kernels are timed.

A GPU runs products of zeros about an eighth faster than those of other numbers, and the gradients of a first step may
all be zero, so a call's own operands would mislead.
"""

import torch
from torch import Tensor, nn

from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.triton.support import KEEP


def random_like(x: Tensor) -> Tensor:
    """Return normal random numbers in the sizes, strides, dtype and device of a tensor, a parameter if it is one.

    No random state of the process is read or changed.
    """
    dice = torch.Generator(x.device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        like = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
        memory = like.untyped_storage().nbytes() // like.itemsize
        like.as_strided((memory,), (1,)).normal_(generator=dice)  # also of elements that share memory
        return nn.Parameter(like, requires_grad=False) if isinstance(x, nn.Parameter) else like


def thin_out(x: Tensor, operand: Operand) -> None:
    """Set two of four elements of a tensor to zero, along the sum, if nothing else prunes it.

    Args:
        x: a random tensor.
        operand: its matrix is a reshaped `x`, perhaps a copy.
    """
    if operand.operator == KEEP and operand.mask is None:
        with torch.no_grad():
            lines = operand.matrix.movedim(operand.dim, 0)
            for place in (2, 3):
                lines[place::4] = 0
            x.copy_(operand.matrix.reshape(x.shape))
