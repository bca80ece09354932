"""Cut a tensor into blocks of M consecutive elements along a dim, and join them again.

Blocks are a tensor `(M, blocks)`: row i holds element i of every block, so arithmetic along a block is elementwise
arithmetic on rows. Block b counts the blocks in C order over the shape of the tensor with `dim` replaced by its number
of blocks, whatever the strides: kernels draw the random number of a block by this index.
"""

import torch.nn.functional as F
from torch import Tensor


def split(x: Tensor, dim: int, block: int) -> Tensor:
    """Return the blocks of `x` along `dim` (non-negative), `(M, blocks)`; they may share memory with `x`.

    A partial last block is padded with zeros. `x` has at least one element.
    """
    missing = -x.shape[dim] % block
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])
    blocks = x.reshape(*x.shape[:dim], -1, block, *x.shape[dim + 1 :])
    return blocks.movedim(dim + 1, 0).reshape(block, -1)


def join(blocks: Tensor, like: Tensor, dim: int) -> Tensor:
    """Invert `split`: return a view of the blocks in the shape of `like`, without the padding."""
    block, length = blocks.shape[0], like.shape[dim]
    outer = list(like.shape)
    outer[dim] = -(-length // block)
    return blocks.reshape(block, *outer).movedim(0, dim + 1).flatten(dim, dim + 1).narrow(dim, 0, length)
