"""Scores of columns that may be reordered, and how much of them N:M keeps for each order."""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.tile_enumeration import ENUMERABLE

CHUNK = 1 << 18  # elements of a temporary tensor, which stays in a cache


@dataclass(frozen=True)
class Scores:
    """Non-negative scores of which the pattern keeps the N largest of each M columns, in every row.

    Args:
        columns: `(columns, rows)`, so that a column lies in one piece.
        is_transposable: whether the mask is N:M along rows as well, in tiles of M rows. Tiles that are too large to be
            enumerated are judged by their rows.
    """

    columns: Tensor
    pattern: NMPattern
    is_transposable: bool = False

    def kept(self, blocks: Tensor) -> Tensor:
        """Return the kept sum of each block of columns, given as indices `(..., M)`."""
        flat = blocks.reshape(-1, blocks.shape[-1])
        size = max(1, CHUNK // (blocks.shape[-1] * self.columns.shape[1]))
        return torch.cat([self._kept(chunk) for chunk in flat.split(size)]).reshape(blocks.shape[:-1])

    def _kept(self, blocks: Tensor) -> Tensor:
        x = self.columns[blocks]
        if not self._has_tiles:
            return torch.stack(_largest(x, self.pattern.n_keep)).sum(0).sum(-1)
        return (self._tiles(x).movedim(-3, -2).flatten(-2) @ self._masks(0)).amax(-1).sum(-1)

    def gains(self, picked: Tensor, rest: Tensor) -> Tensor:
        """Return what each picked column adds to each block of M - 1 columns that is in the same group.

        Args:
            picked: columns, `(groups, picked)`.
            rest: columns, `(groups, blocks, M - 1)`.

        Returns:
            `(groups, picked, blocks)`.
        """
        return self._tile_gains(picked, rest) if self._has_tiles else self._row_gains(picked, rest)

    def _row_gains(self, picked: Tensor, rest: Tensor) -> Tensor:
        """Sum max(0, x - t) over rows, where t is the N-th largest of the rest: half of an L1 distance and two sums."""
        x, t = self.columns[picked], _largest(self.columns[rest], self.pattern.n_keep)[-1]
        return (torch.cdist(x, t, p=1) + x.sum(2).unsqueeze(2) - t.sum(2).unsqueeze(1)) / 2

    def _tile_gains(self, picked: Tensor, rest: Tensor) -> Tensor:
        """Sum over tiles the best choice of rows for the new column, with the best of the other columns beside it."""
        choices = _row_choices(self.pattern).to(self.columns)
        new = self._tiles(self.columns[picked]) @ choices.T  # (groups, picked, tiles, choices)
        tile = self._tiles(self.columns[rest]).movedim(-3, -2).flatten(-2)  # (groups, blocks, tiles, columns x rows)
        best = (tile @ self._masks(1)).unflatten(-1, (len(choices), -1)).amax(-1)
        size = max(1, CHUNK // (picked.numel() * rest.shape[1]))
        chunks = zip(new.split(size, 2), best.split(size, 2), strict=True)
        return torch.stack([_best_sum(a.unsqueeze(2), b.unsqueeze(1)) for a, b in chunks]).sum(0)

    @property
    def _has_tiles(self) -> bool:
        return self.is_transposable and self.pattern.block <= ENUMERABLE

    def _tiles(self, x: Tensor) -> Tensor:
        """Return columns with their rows in groups of M, `(..., tiles, M)`."""
        tiles: Tensor = F.pad(x, [0, -x.shape[-1] % self.pattern.block]).unflatten(-1, (-1, self.pattern.block))
        return tiles

    def _masks(self, known: int) -> Tensor:
        """Return the masks of a tile without its first `known` columns."""
        return _tile_masks(self.pattern)[known * self.pattern.block :].to(self.columns)


def _largest(x: Tensor, count: int) -> list[Tensor]:
    """Return the largest elements along the second-last dim, in descending order, by comparing whole columns."""
    top: list[Tensor] = []
    for one in x.unbind(-2):
        for index, held in enumerate(top):
            top[index], one = torch.maximum(held, one), torch.minimum(held, one)
        if len(top) < count:
            top.append(one)
    return top


def _best_sum(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over tiles of the largest a + b over the last dim; both broadcast."""
    pairs = [(x.contiguous(), y.contiguous()) for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True)]
    best = pairs[0][0] + pairs[0][1]
    for x, y in pairs[1:]:
        torch.maximum(best, x + y, out=best)
    return best.sum(-1)


@cache
def _row_choices(pattern: NMPattern) -> Tensor:
    """Return all choices of N of M rows, `(choices, M)` of zeros and ones."""
    chosen = torch.tensor(list(combinations(range(pattern.block), pattern.n_keep)))
    return torch.zeros(len(chosen), pattern.block).scatter_(1, chosen, 1.0)


@cache
def _tile_masks(pattern: NMPattern) -> Tensor:
    """Return all masks of a tile, `(columns x rows, masks)`, ordered by the rows that the first column keeps."""
    tiles = torch.stack([torch.stack(columns) for columns in product(_row_choices(pattern), repeat=pattern.block)])
    return tiles[(tiles.sum(1) == pattern.n_keep).all(-1)].flatten(1).T.contiguous()


@cache
def splits(block: int) -> Tensor:
    """Return all ways to split 2 M columns into two blocks, `(ways, 2, M)`; the first leaves all in place."""
    firsts = [(0, *rest) for rest in combinations(range(1, 2 * block), block - 1)]
    return torch.tensor([[first, [one for one in range(2 * block) if one not in first]] for first in firsts])
