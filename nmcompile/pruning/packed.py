"""2:4 tensors without their zeros: the two kept values of every group of four, and their places.

The indices are two bits for each kept value, its place in the group, in increasing order: the first group's four bits
are the low half of a byte, the next group's the high half. A last group without a neighbour leaves the high half zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.errors import OperandError
from nmcompile.pruning.operator import check

GROUP, KEPT = 4, 2
GROUPS_PER_BYTE = 2


class Packed(NamedTuple):
    """A tensor that is 2:4 along a dim of `size` elements.

    Args:
        values: the dtype of the tensor, `size / 2` along the dim.
        indices: uint8, `size / 8` along the dim, rounded up.
    """

    values: Tensor
    indices: Tensor


def packed_shapes(shape: tuple[int, ...], dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of values and indices of a tensor of this shape, packed along `dim`.

    Raises:
        OperandError: the size of the dim is not a multiple of four.
    """
    size = shape[dim]
    if size % GROUP:
        raise OperandError(
            f"dim {dim} of shape {tuple(shape)} cannot be packed as 2:4: its size {size} is not a multiple of {GROUP}"
        )
    per_byte = GROUP * GROUPS_PER_BYTE
    before, after = tuple(shape[:dim]), tuple(shape[dim + 1 :])
    return (*before, size * KEPT // GROUP, *after), (*before, (size + per_byte - 1) // per_byte, *after)


def two_of_four(x: Tensor, dim: int) -> Tensor:
    """Return the mask that packs a tensor with at most two non-zeros in every group of four along `dim`.

    It is true for the non-zeros and, if there are fewer than two, for the first zeros of the group. bool of the shape
    of `x`; the size of `dim` is a multiple of four.

    Raises:
        OperandError: the dim does not exist.
    """
    dim = check(x, dim)
    nonzero = (x.detach() != 0).movedim(dim, -1).unflatten(-1, (-1, GROUP))
    missing = KEPT - nonzero.sum(-1, keepdim=True)
    filled: Tensor = nonzero | (~nonzero & ((~nonzero).cumsum(-1) <= missing))
    return filled.flatten(-2).movedim(-1, dim)


def pack(x: Tensor, mask: Tensor, dim: int) -> Packed:
    """Keep the elements of `x` that the mask keeps.

    Args:
        x: float64, float32, bfloat16 or float16.
        mask: bool of the shape of `x`, true for exactly two of every four consecutive elements along `dim`.
        dim: of a size that is a multiple of four.

    Returns:
        Contiguous values and indices.

    Raises:
        OperandError: the dim does not exist or does not fit, or the mask keeps another number somewhere.
    """
    dim = check(x, dim)
    _, shape = packed_shapes(tuple(x.shape), dim)
    groups = mask.movedim(dim, -1).unflatten(-1, (-1, GROUP))
    if not bool((groups.sum(-1) == KEPT).all()):
        raise OperandError(f"the mask does not keep {KEPT} of every {GROUP} elements along dim {dim}; pack 2:4 masks")
    # A stable sort puts the kept places first, in increasing order.
    places = groups.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :KEPT]
    values = x.detach().movedim(dim, -1).unflatten(-1, (-1, GROUP)).gather(-1, places)
    codes = places[..., 0] | places[..., 1] << 2
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % GROUPS_PER_BYTE))
    pairs = codes.unflatten(-1, (shape[dim], GROUPS_PER_BYTE))
    indices = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return Packed(values.flatten(-2).movedim(-1, dim).contiguous(), indices.movedim(-1, dim).contiguous())


def unpack(packed: Packed, dim: int) -> Tensor:
    """Return the tensor with its zeros, contiguous, of the dtype of the values."""
    values = packed.values.movedim(dim, -1).unflatten(-1, (-1, KEPT))
    codes = packed.indices.movedim(dim, -1).unsqueeze(-1)
    shifts = torch.tensor([0, 4], dtype=torch.uint8, device=codes.device)
    codes = (codes >> shifts).flatten(-2)[..., : values.shape[-2]]
    places = torch.stack([codes & 3, codes >> 2 & 3], -1).long()
    dense: Tensor = values.new_zeros(*values.shape[:-1], GROUP).scatter_(-1, places, values)
    return dense.flatten(-2).movedim(-1, dim).contiguous()
