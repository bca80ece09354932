"""Layout of the library's compressed indices, found by compressing matrices that reveal it.

A compressed matrix is its kept values by rows, followed by four bits for each group of four elements: the places of the
two kept ones, the code of `nmcompile.pruning.packed`. The order of the codes is not documented, and differs between
GPUs, types and versions of the library. The assumption is that a row and a group each add their part to the address; a
comparison of all bytes has to confirm this, and that the whole is right.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.triton.layout import Places
from nmcompile.pruning.packed import GROUP

LAST = 0xE  # the code of a group that keeps its last two elements; probes keep the first two of the others
PARTNERS = 1, 2, 4, 8
Compress = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """Layout of a compressed matrix.

    Args:
        size: size in bytes.
        start: offset of the codes.
        places: places of the codes.
        filler: the value of the bytes without a place, which the library appends to some sizes; None if there are none.
    """

    size: int
    start: int
    places: Places
    filler: int | None


def find_layout(rows: int, depth: int, dtype: torch.dtype, device: torch.device, compress: Compress) -> Layout | None:
    """Find the layout of `(rows, depth)` matrices; None if rows and groups do not each add their part to the address.

    Args:
        rows, depth: sizes that the library takes without padding.
        dtype, device: of the matrices.
        compress: returns the bytes that the library stores.
    """
    start = rows * depth // 2 * dtype.itemsize
    size = 0

    def last_groups(row: slice | Tensor, group: slice | Tensor) -> Tensor:
        """Return which codes, in stored order, say that the last two are kept, if only these groups keep them."""
        nonlocal size
        flags = torch.zeros(rows, depth // GROUP, dtype=torch.bool, device=device)
        flags[row, group] = True
        compressed = compress(torch.stack([~flags, ~flags, flags, flags], -1).flatten(1).to(dtype))
        size = len(compressed)
        codes = compressed[start:]
        return torch.stack([codes & 0xF, codes >> 4], -1).flatten() == LAST

    first = slice(0, 1)
    of_groups = _places(depth // GROUP, device, lambda group: last_groups(first, group))
    of_rows = _places(rows, device, lambda row: last_groups(row, first))
    if of_groups is None or of_rows is None:
        return None
    partner = _partner(of_rows - of_rows[0], of_groups - of_groups[0])
    if partner is None:
        return None
    lines = (of_rows + 2 * start).div(2, rounding_mode="floor")
    blocks = (of_groups - of_groups[0]).div(2, rounding_mode="floor")
    if int(lines.min() + blocks.min()) < start or int(lines.max() + blocks.max()) >= size:
        return None  # the kernel would write there
    empty = compress(torch.zeros(rows, depth, dtype=dtype, device=device))
    fillers = _bytes_without_place(empty, lines, blocks, start)
    if len(fillers) > 1:
        return None
    index = torch.int32 if size < 2**31 else torch.int64
    filler = int(fillers) if len(fillers) else None
    return Layout(size, start, Places(lines.to(index), blocks.to(index), partner), filler)


def _bytes_without_place(compressed: Tensor, lines: Tensor, blocks: Tensor, start: int) -> Tensor:
    """Return the different values of the bytes from `start` on that hold the codes of no group."""
    if len(compressed) - start == len(lines) * len(blocks) // 2:
        return compressed[:0]
    is_free = torch.ones(len(compressed), dtype=torch.bool, device=compressed.device)
    is_free[:start] = False
    is_free[lines.view(-1, 1) + blocks] = False
    values: Tensor = compressed[is_free].unique()
    return values


def _places(count: int, device: torch.device, probe: Callable[[slice | Tensor], Tensor]) -> Tensor | None:
    """Find the places of the codes of `count` groups, by a probe per bit of their numbers; None without an order."""
    places = probe(slice(None)).nonzero().flatten()
    if len(places) != count:
        return None
    numbers = torch.arange(count, device=device)
    found = torch.zeros_like(numbers)
    for bit in range((count - 1).bit_length()):
        found |= probe(numbers[numbers >> bit & 1 == 1])[places].long() << bit
    if not torch.equal(found.sort().values, numbers):
        return None
    return torch.empty_like(places).index_put_((found,), places)


def _partner(rows: Tensor, groups: Tensor) -> int | None:
    """Return which group's code shares a byte with that of a group: see `Places`."""
    if _are_pairs(groups, 1) and bool((rows % 2 == 0).all()):
        return 0
    if bool((groups % 2 == 0).all()):
        return next((partner for partner in PARTNERS if _are_pairs(rows, partner)), None)
    return None


def _are_pairs(places: Tensor, partner: int) -> bool:
    """Return whether the halves of a byte always are two codes that far apart."""
    if len(places) % (2 * partner):
        return False
    low, high = places.unflatten(0, (-1, 2, partner)).unbind(1)
    return bool((low % 2 == 0).all()) and torch.equal(high, low + 1)
