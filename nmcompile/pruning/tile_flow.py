"""The exact transposable mask of tiles of any size, as a min-cost flow through all tiles at once.

Rows send N units each to columns that take N each. Let every row send to its N largest elements: no mask keeps more,
but some columns get too many and others too few. Then move one unit at a time from a column with too many to one with
too few, along the path that loses least. A step of a path from column c to column d is a row that gives up (r, c) and
takes (r, d). Successive cheapest paths end in the optimum; a tile of 4:8 needs about four.

Scores are rounded to integers, 2⁻⁴⁰ of the tile's largest, so that sums are exact and no rounding makes a cycle of
steps seem to gain.
"""

import torch
from torch import Tensor

from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.selection import largest

STEPS = 2.0**40


def select_by_flow(a: Tensor, pattern: NMPattern) -> Tensor:
    """Return the mask of the largest sum of finite magnitudes `a`, both `(M * M, tiles)`."""
    block = pattern.block
    scores = _integers(a).t().reshape(-1, block, block)
    mask = largest(scores.flatten(0, 1).t(), pattern.n_keep).t().reshape(scores.shape)
    while True:
        excess = mask.sum(1) - pattern.n_keep
        unbalanced = (excess > 0).any(1)
        if not unbalanced.any():
            return mask.flatten(1).t()
        mask[unbalanced] = _move_one(scores[unbalanced], mask[unbalanced], excess[unbalanced])


def _integers(a: Tensor) -> Tensor:
    greatest = a.double().amax(0)
    return (a / torch.where(greatest > 0, greatest, 1.0) * STEPS).round()


def _move_one(scores: Tensor, mask: Tensor, excess: Tensor) -> Tensor:
    """Return the masks `(tiles, M, M)` after one unit went down the cheapest path; `excess` is that of each column."""
    gain, row = _best_steps(scores, mask)
    before, end = _best_paths(gain, excess)
    tile = torch.arange(len(mask), device=mask.device)
    while len(tile):
        start = before[tile, end]
        goes_on = start >= 0
        tile, start, end = tile[goes_on], start[goes_on], end[goes_on]
        mask[tile, row[tile, start, end], start] = False
        mask[tile, row[tile, start, end], end] = True
        end = start
    return mask


def _best_steps(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gain of the best step between any two columns, `(tiles, from, to)`, and the row that makes it."""
    given = torch.where(mask, -scores, -torch.inf)
    taken = torch.where(mask, -torch.inf, scores)
    gain = given[:, 0].unsqueeze(2) + taken[:, 0].unsqueeze(1)
    row = torch.zeros_like(gain, dtype=torch.int64)
    for r in range(1, scores.shape[1]):
        candidate = given[:, r].unsqueeze(2) + taken[:, r].unsqueeze(1)
        row = torch.where(candidate > gain, r, row)
        gain = torch.maximum(candidate, gain)
    return gain, row


def _best_paths(gain: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Find the best paths out of columns with too many, by Bellman and Ford.

    Returns:
        For each column the one before it, or -1 at the start, `(tiles, M)`, and the best column with too few.
    """
    reach = torch.where(excess > 0, 0.0, -torch.inf).to(gain.dtype)
    before = torch.full_like(excess, -1)
    for _ in range(1, gain.shape[1]):
        best, start = (reach.unsqueeze(2) + gain).max(1)
        better = best > reach
        if not better.any():
            break
        reach = torch.where(better, best, reach)
        before = torch.where(better, start, before)
    return before, torch.where(excess < 0, reach, -torch.inf).argmax(1)
