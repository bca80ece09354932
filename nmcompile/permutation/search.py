"""Search for the order of columns of which N:M keeps most, the aim of Pool & Yu (2021).

Take one column out of each block. How much each of them adds to each block is a matrix, and the best way to put all of
them back is an assignment problem, solved exactly: a move over all exchanges of these columns at once, where a greedy
search sees one pair. Blocks exchange in random groups, so that the work for a round is linear in the number of scores.
Random choices of columns follow each other, and so local optima of swaps are left. Where such rounds gain no more,
pairs of blocks are split anew in the best of all ways, as Pool & Yu do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nmcompile.permutation.assignment import assign
from nmcompile.permutation.scores import Scores, splits

LOOKS = 1280  # at each score, all rounds together; no clock, so that every run finds the same order
LEAST = 1 << 30  # looks at all scores of a small layer
ROUND = 1 << 20  # looks that take as long as the operators' calls of a round
WIDTHS = ((24, 0.9), (96, 0.6), (384, 0.0))
"""Numbers of blocks that exchange columns with each other, and the shares of the budget that each leaves.

Few blocks gain more for each look while much is to be gained, and many while little is.
"""
PATIENCE = 20  # rounds without a gain
PAIRS = 64  # pairs of blocks of a round
MOST_WAYS = 35  # of splitting a pair: those of M = 4; there are 6435 for M = 8
SORTING = 4  # looks that take as long as putting a score in its place in a block
TOLERANCE = 1e-7  # a gain below this share of all scores is rounding
FEWEST_ROUNDS = 40  # for which many rows are thinned out


def find_order(parts: Sequence[Scores], budget: int | None = None) -> Tensor:
    """Return an order of the columns of all parts, int64 `(columns,)`, of which they keep much.

    It keeps at least as much as the order that they have now, if the budget does not ask to look at fewer rows.

    Args:
        parts: layers that share their columns, with one M. The number of columns is a multiple of it.
        budget: the number of looks at scores; None for so many that the time grows with the number of scores.
    """
    budget = max(LEAST, LOOKS * sum(part.columns.numel() for part in parts)) if budget is None else budget
    parts = [_thinned(part, budget / FEWEST_ROUNDS / len(parts)) for part in parts]
    return _Search(parts, budget).run().flatten()


def _thinned(part: Scores, most: float) -> Scores:
    """Return a part with evenly chosen rows if a round would cost more than this; tiles stay whole."""
    columns, block = part.columns, part.pattern.block
    blocks = len(columns) // block
    step = -int(-(columns.shape[1] * blocks * min(WIDTHS[0][0], blocks)) // most)
    if step <= 1:
        return part
    tiles = columns[:, : columns.shape[1] // block * block].unflatten(1, (-1, block))
    return Scores(tiles[:, ::step].flatten(1).contiguous(), part.pattern, part.is_transposable)


@dataclass
class _Search:
    """The blocks of columns as they are so far, `(blocks, M)`, and what is left of the budget."""

    parts: Sequence[Scores]
    budget: float
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        block = self.parts[0].pattern.block
        self.rows = sum(part.columns.shape[1] for part in self.parts)
        self.order = torch.arange(len(self.parts[0].columns)).reshape(-1, block)
        self.least = TOLERANCE * sum(float(part.columns.sum(dtype=torch.float64)) for part in self.parts)

    def run(self) -> Tensor:
        """Alternate both moves until neither gains, or the budget is spent."""
        can_split = len(splits(self.order.shape[1])) <= MOST_WAYS
        is_better, whole = len(self.order) > 1, self.budget
        while is_better and self.budget > 0:
            is_better = False
            for width, left in WIDTHS:
                is_better |= self._until_stale(partial(self._reassign, width), left * whole)
            is_better |= can_split and self._until_stale(self._split_again)
        return self.order

    def _until_stale(self, move: Callable[[], float], left: float = 0.0) -> bool:
        """Repeat a move until it has not gained for some rounds, or this budget is left; return whether it gained."""
        stale, has_gained = 0, False
        while stale < PATIENCE and self.budget > left:
            stale = 0 if move() > self.least else stale + 1
            has_gained |= stale == 0
        return has_gained

    def _reassign(self, most: int) -> float:
        """Take a column out of each block, put all back where they add most in groups of blocks; return the gain.

        Args:
            most: blocks of a group.
        """
        block, width = self.order.shape[1], min(most, len(self.order))
        blocks = self._random_blocks(len(self.order) // width * width)
        rotation = (torch.randint(block, (len(blocks), 1), generator=self.generator) + torch.arange(block)) % block
        members = self.order[blocks].gather(1, rotation).unflatten(0, (-1, width))  # (groups, width, M)
        picked, rest = members[:, :, 0], members[:, :, 1:]
        gains = torch.stack([part.gains(picked, rest).cpu().double() for part in self.parts]).sum(0)
        self.budget -= ROUND + gains.numel() * self.rows
        columns = assign(gains)
        gain = float(gains.gather(1, columns.unsqueeze(1)).sum() - gains.diagonal(dim1=1, dim2=2).sum())
        if gain > self.least:
            members[:, :, 0] = picked.gather(1, columns)
            self.order[blocks] = members.flatten(0, 1)
        return gain

    def _split_again(self) -> float:
        """Split the columns of random pairs of blocks in the best way, and return the gain."""
        pairs = self._random_blocks(2 * PAIRS)
        pairs = pairs[: len(pairs) // 2 * 2].reshape(-1, 2)
        ways = self.order[pairs].flatten(1)[:, splits(self.order.shape[1])]  # (pairs, ways, 2, M)
        kept = torch.stack([part.kept(ways).cpu().double() for part in self.parts]).sum(0).sum(-1)
        self.budget -= ROUND + SORTING * ways.numel() * self.rows
        best = kept.argmax(1)
        gain = float((kept.gather(1, best[:, None])[:, 0] - kept[:, 0]).sum())
        if gain > self.least:
            self.order[pairs] = ways[torch.arange(len(pairs)), best]
        return gain

    def _random_blocks(self, most: int) -> Tensor:
        return torch.randperm(len(self.order), generator=self.generator)[:most]
