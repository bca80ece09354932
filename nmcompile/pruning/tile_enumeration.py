"""The exact transposable mask of small tiles, by going through all patterns at once.

A tile of four rows is cut into a top and a bottom half (other sizes likewise). Which bottom halves fit a top
half depends only on how many elements it keeps per column: the 36 top halves of 2:4 fall into 19 such classes, and 90
of the 36 x 36 pairs fit. So the best bottom half of every class is found first, then the best top half.

In floats: a row's sum adds its kept |w| in column order, a half's sum adds its row sums in row order, and a tile's sum
is top + bottom. Halves are ordered by their rows' kept columns, in lexicographic order ((0, 1) before (0, 2)); of equal
bottoms the first wins, then of equal tiles the first top. If the sums are exact, that is the first pattern in
lexicographic order.
"""

import functools
from itertools import combinations, product

import torch
from torch import Tensor

from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.selection import total

ENUMERABLE = 4  # largest M with few enough patterns: 90 for 2:4, but 2040 for 2:5 and 10**11 for 4:8

Half = tuple[tuple[int, ...], ...]
"""Kept columns of each row."""
Counts = tuple[int, ...]
"""Number of kept elements in each column."""
RowSums = dict[tuple[int, ...], Tensor]
"""Sum of a row's kept elements, `(tiles,)`, by the kept columns."""
Best = tuple[Tensor, Tensor]
"""Largest sum and the index of its half, `(tiles,)` each."""


@functools.cache
def halves(n_keep: int, block: int, rows: int) -> dict[Half, Counts]:
    """Return all choices of N columns in each of `rows` rows, in lexicographic order, with their counts."""
    choices = product(combinations(range(block), n_keep), repeat=rows)
    return {half: tuple(sum(column in row for row in half) for column in range(block)) for half in choices}


def select_by_enumeration(a: Tensor, pattern: NMPattern) -> Tensor:
    """Return the mask of the largest sum of magnitudes `a`, both `(M * M, tiles)`."""
    n_keep, block = pattern.n_keep, pattern.block
    sums = [_row_sums(row, n_keep) for row in torch.split(a, block)]
    cut = block // 2
    tops, bottoms = halves(n_keep, block, cut), halves(n_keep, block, block - cut)
    best_bottoms = _best_by_counts(sums[cut:], bottoms)
    best = torch.full_like(a[0], -1.0)
    top = torch.zeros_like(best, dtype=torch.int8)
    bottom = torch.zeros_like(top)
    for index, (half, counts) in enumerate(tops.items()):
        left = tuple(n_keep - count for count in counts)
        if left in best_bottoms:
            bottom_sum, bottom_index = best_bottoms[left]
            candidate = _half_sum(sums[:cut], half) + bottom_sum
            better = candidate > best
            best = torch.where(better, candidate, best)
            top = torch.where(better, index, top)
            bottom = torch.where(better, bottom_index, bottom)
    return torch.cat([_spread(tops, top, block), _spread(bottoms, bottom, block)])


def _best_by_counts(sums: list[RowSums], members: dict[Half, Counts]) -> dict[Counts, Best]:
    """Find the first half with the largest sum among the halves with equal counts."""
    best: dict[Counts, Best] = {}
    for index, (half, counts) in enumerate(members.items()):
        candidate = _half_sum(sums, half)
        if counts in best:
            value, chosen = best[counts]
            best[counts] = torch.maximum(candidate, value), torch.where(candidate > value, index, chosen)
        else:
            best[counts] = candidate, torch.full_like(candidate, index, dtype=torch.int8)
    return best


def _row_sums(row: Tensor, n_keep: int) -> RowSums:
    return {columns: total(row[list(columns)]) for columns in combinations(range(row.shape[0]), n_keep)}


def _half_sum(sums: list[RowSums], half: Half) -> Tensor:
    result = sums[0][half[0]]
    for row, columns in zip(sums[1:], half[1:], strict=True):
        result = result + row[columns]
    return result


def _spread(members: dict[Half, Counts], chosen: Tensor, block: int) -> Tensor:
    """Return the masks `(rows * M, tiles)` of the chosen halves."""
    table = torch.tensor([[column in row for row in half for column in range(block)] for half in members])
    return table.to(chosen.device)[chosen.long()].t()
