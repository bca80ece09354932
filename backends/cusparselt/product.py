"""One product with a sparse weight: padded, compressed, multiplied by the kernel that pays."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.choices import note, run_best
from nmcompile.backends.cusparselt.library import best_algorithm, compress, multiply
from nmcompile.backends.cusparselt.support import Sizes, operand_refusal, padded
from nmcompile.ir.choice import Choice


class Product(NamedTuple):
    """`dense @ sparse.T + bias`.

    Args:
        call: the name of the node that asks.
        sparse: `(rows, depth)`, at most two of every four elements of a row non-zero.
        dense: `(lanes, depth)`.
        bias: `(rows,)`.
    """

    call: str
    sparse: Tensor
    dense: Tensor
    bias: Tensor | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.sparse.shape[0], self.sparse.shape[1], self.dense.shape[0])


def run_product(product: Product, restore: Callable[[Tensor], Tensor], dense: Callable[[], Tensor]) -> Tensor:
    """The result by the kernel that pays.

    Args:
        product: of matrices.
        restore: from `(lanes, rows)` to what the layer gives.
        dense: the same by the dense kernel.
    """
    refusal = operand_refusal(product.sparse, product.dense)
    if refusal:
        note(product.call, Choice("dense", refusal))
        return dense()
    sizes, device = product.sizes, product.dense.device
    strides = product.sparse.stride(), product.dense.stride()
    problem = "cusparselt", tuple(sizes), strides, str(product.dense.dtype), product.bias is None, str(device)
    multiplications = sizes.rows * sizes.depth * sizes.lanes

    def sparse() -> Tensor | None:
        result = sparse_product(product)
        return None if result is None else restore(result)

    return run_best(product.call, problem, multiplications, lambda: None, sparse, dense)


def sparse_product(product: Product) -> Tensor | None:
    """`(lanes, rows)`; None where no algorithm of the library is right."""
    sizes = padded(product.sizes)
    # The library compresses what is laid out by rows.
    sparse = _pad(product.sparse, sizes.rows, sizes.depth).contiguous()
    dense = _pad(product.dense, sizes.lanes, sizes.depth).contiguous()
    bias = None if product.bias is None else F.pad(product.bias, (0, sizes.rows - len(product.bias)))
    compressed = compress(sparse)
    algorithm = best_algorithm(compressed, dense, bias, lambda: F.linear(dense, sparse, bias))
    if algorithm is None:
        return None
    lanes, rows = product.dense.shape[0], product.sparse.shape[0]
    return multiply(compressed, dense, bias, algorithm)[:lanes, :rows].contiguous()


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    missing = rows - x.shape[0], columns - x.shape[1]
    return F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x


def by_rows(x: Tensor, channel_dim: int) -> Tensor:
    """A matrix with a row for every position; a view where channels are last in memory."""
    return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim])


def by_channels(rows: Tensor, like: Tensor, channels: int) -> Tensor:
    """The rows as an image of the size and memory format of `like`, with other channels."""
    samples, _, *spatial = like.shape
    image = rows.view(samples, *spatial, channels).movedim(-1, 1)
    is_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return image if is_last else image.contiguous()
