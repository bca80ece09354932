"""The assignment problem: which of n columns goes to which of n blocks for the largest total gain, for many at once.

An assignment is best exactly when no cycle of exchanges gains. Starting with every column in its own block, pairs that
are each other's best exchange change places, and then cycles of any length, which Bellman and Ford's algorithm finds as
circles among the predecessors of its longest walks (Klein 1967). A step moves along all that it finds, in all problems.
"""

import torch
from torch import Tensor

TOLERANCE = 1e-9  # a gain below this share of the largest is rounding
FEWEST = 3  # edges of walks between two looks for circles


def assign(gains: Tensor) -> Tensor:
    """Return for each block the column that is assigned to it, so that the sum of gains is largest.

    Args:
        gains: gain of each column in each block, finite, `(problems, columns, blocks)` with as many of both.

    Returns:
        int64 `(problems, blocks)`.
    """
    held = gains.double()
    least = TOLERANCE * float(gains.abs().max())
    columns = torch.arange(gains.shape[1]).expand(gains.shape[:2])
    for find in (_pairs, _cycles):
        while (moves := find(held, least)) is not None:
            held = held.gather(1, moves.unsqueeze(2).expand_as(held))
            columns = columns.gather(1, moves)
    return columns


def _pairs(gains: Tensor, least: float) -> Tensor | None:
    """Return for each block where its next column is now: pairs change places that are each other's best choice."""
    present = gains.diagonal(dim1=1, dim2=2)
    best, partner = (gains + gains.mT - present.unsqueeze(1) - present.unsqueeze(2)).max(2)
    own = torch.arange(gains.shape[1]).expand_as(partner)
    moving = (partner.gather(1, partner) == own) & (best > least)
    return torch.where(moving, partner, own) if moving.any() else None


def _cycles(gains: Tensor, least: float) -> Tensor | None:
    """Return for each block where its next column is now, along cycles that gain; None if there are none."""
    count = gains.shape[1]
    steps = gains - gains.diagonal(dim1=1, dim2=2).unsqueeze(1)
    longest = torch.zeros_like(gains[:, 0])
    before = torch.full((len(gains), count + 1), count)  # the last node is before all that no walk has reached
    for edges in range(1, 2 * count + FEWEST):
        walks, last = (longest.unsqueeze(2) + steps).max(1)
        is_longer = walks > longest + least
        if not is_longer.any():
            return None
        longest = torch.where(is_longer, walks, longest)
        before[:, :count] = torch.where(is_longer, last, before[:, :count])
        on_circle = _on_circles(before) if edges >= FEWEST else is_longer.new_zeros(1)
        if on_circle.any():
            return torch.where(on_circle, before[:, :count], torch.arange(count))
    return None


def _on_circles(before: Tensor) -> Tensor:
    """Return which nodes, but the last, are their own predecessor after some steps: those reached after many steps."""
    reached = before
    for _ in range(before.shape[1].bit_length()):
        reached = reached.gather(1, reached)
    return torch.zeros_like(before, dtype=torch.bool).scatter_(1, reached, True)[:, :-1]
