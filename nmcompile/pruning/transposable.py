"""Transposable masks: N of every M elements along both dims of a weight (Hubara et al. 2021).

The forward and the backward GEMM then share one sparse weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nmcompile.checks import check_choice, described
from nmcompile.errors import OperandError
from nmcompile.pruning.operator import check
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.tile_enumeration import ENUMERABLE, select_by_enumeration
from nmcompile.pruning.tile_flow import select_by_flow
from nmcompile.pruning.tiles import join_tiles, split_tiles, tile_magnitudes

CHUNK = 1 << 20  # elements at a time; 2:4 needs about 64 bytes for each

Method = Callable[[Tensor, NMPattern], Tensor]
"""(magnitudes of tiles `(M * M, tiles)`, pattern) -> mask of the same shape."""


def transposable_mask(
    w: Tensor, pattern: NMPattern | str, *, dims: tuple[int, int] = (-2, -1), method: str = "exact"
) -> Tensor:
    """Return the mask that keeps N of M along both dims in every M x M tile, with as much Σ|w| as the method finds.

    Args:
        w: float64, float32, bfloat16 or float16 of at least two dims.
        pattern: an `NMPattern` or text, `"2:4"`.
        dims: the two dims that tiles cover; all others are batch. A partial tile counts as padded with zeros and so
            keeps at most N.
        method: `"exact"`, the optimum of all masks with N in every row and column: by enumeration for M <= 4 (90
            patterns for 2:4; ties go to the first, see `tile_enumeration`), else by min-cost flow (to 2⁻⁴⁰ of the
            tile's largest element); or `"greedy"`, which keeps at least half the optimum: elements in descending
            order are taken while row and column have less than N, ties to the lowest index. Greedy may leave rows
            and columns short of N.

    Returns:
        bool of the shape of `w`, with the strides of `torch.empty_like(w)`. Non-finite elements rank first.

    Raises:
        OperandError: `w` is not a float tensor, or does not have the two dims.
        ConfigError: the method is unknown.
    """
    fitting = NMPattern.parse(pattern)
    check_choice("method", method, METHODS)
    if not isinstance(dims, tuple | list) or len(dims) != 2:
        raise OperandError(f"dims is {described(dims)}; give two dims, as in dims=(0, 1)")
    axes = check(w, dims[0]), check(w, dims[1])
    if axes[0] == axes[1]:
        raise OperandError(f"dims {dims} of shape {tuple(w.shape)} are the same dim; tiles cover two")
    result = torch.empty_like(w, dtype=torch.bool, requires_grad=False)
    if w.numel():
        tiles = split_tiles(w.detach(), axes, fitting.block)
        result.copy_(join_tiles(_select(tiles, fitting, METHODS[method]), w, axes, fitting.block))
    return result


def select_greedily(a: Tensor, pattern: NMPattern) -> Tensor:
    """Return the greedy 2-approximation, for all tiles at once."""
    block = pattern.block
    order = torch.sort(a, dim=0, descending=True, stable=True).indices
    mask = torch.zeros_like(a, dtype=torch.bool)
    in_row = torch.zeros(block, a.shape[1], dtype=torch.int32, device=a.device)
    in_column = torch.zeros_like(in_row)
    for element in order.unsqueeze(1):
        row, column = element // block, element % block
        free = (in_row.gather(0, row) < pattern.n_keep) & (in_column.gather(0, column) < pattern.n_keep)
        mask.scatter_(0, element, free)
        in_row.scatter_add_(0, row, free.int())
        in_column.scatter_add_(0, column, free.int())
    return mask


def select_exactly(a: Tensor, pattern: NMPattern) -> Tensor:
    """Return the optimum, by enumeration if the patterns are few."""
    return (select_by_enumeration if pattern.block <= ENUMERABLE else select_by_flow)(a, pattern)


METHODS: dict[str, Method] = {"exact": select_exactly, "greedy": select_greedily}


def _select(tiles: Tensor, pattern: NMPattern, method: Method) -> Tensor:
    chunks = torch.split(tiles, max(1, CHUNK // pattern.block**2), dim=1)
    return torch.cat([method(tile_magnitudes(chunk, pattern.block).contiguous(), pattern) for chunk in chunks], dim=1)
