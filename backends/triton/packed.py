"""The packed form of 2:4 lines: half the values, and a byte for every two blocks.

`values` holds two elements of each block of four in index order: its non-zeros, and where those are fewer than two the
lowest of its zeros. Byte i of `positions` says where in blocks 2i and 2i + 1 they belong: bits 0-1 and 2-3 for the two
of the even block, bits 4-5 and 6-7 for those of the odd one. Rows are contiguous. cuSPARSELt's layout is another one.
"""

import torch
from torch import Tensor

SHIFTS = (0, 2, 4, 6)


def pack(lines: Tensor) -> tuple[Tensor, Tensor]:
    """The packed form of 2:4 lines `(n, length)`, length a multiple of 8.

    Returns:
        values `(n, length / 2)` of the dtype of `lines`, and positions `(n, length / 8)` uint8.
    """
    blocks = lines.unflatten(1, (-1, 4))
    two = torch.sort((blocks == 0).to(torch.int8), dim=2, stable=True).indices[..., :2].sort(dim=2).values
    values = blocks.gather(2, two).flatten(1)
    fields = two.reshape(lines.shape[0], -1, 4) << torch.tensor(SHIFTS, device=lines.device)
    return values, fields.sum(2).to(torch.uint8)


def unpack(values: Tensor, positions: Tensor) -> Tensor:
    """The lines `(n, length)` that `pack` took."""
    fields = (positions.long().unsqueeze(2) >> torch.tensor(SHIFTS, device=positions.device)) & 3
    two, pairs = fields.reshape(len(values), -1, 2), values.unflatten(1, (-1, 2))
    blocks: Tensor = pairs.new_zeros(*two.shape[:2], 4).scatter_(2, two, pairs)
    return blocks.flatten(1)
