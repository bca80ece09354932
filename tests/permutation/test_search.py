"""The search finds optima of tiny matrices, leaves local optima of swaps, and never loses."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nmcompile.permutation.assignment import assign
from nmcompile.permutation.scores import Scores
from nmcompile.permutation.search import find_order
from nmcompile.pruning.pattern import NMPattern
from nmcompile.pruning.transposable import transposable_mask

TWO_FOUR = NMPattern(2, 4)


def kept(matrix: Tensor, order: Tensor, pattern: NMPattern, is_transposable: bool) -> float:
    """Return the kept sum by the operators of the package."""
    x = matrix[:, order]
    if is_transposable:
        return float((x * transposable_mask(x, pattern)).sum())
    return float(x.unflatten(1, (-1, pattern.block)).topk(pattern.n_keep, -1).values.sum())


def partitions(columns: tuple[int, ...], block: int) -> list[tuple[int, ...]]:
    """Return every way to put columns into blocks, once."""
    if not columns:
        return [()]
    found = []
    for others in combinations(columns[1:], block - 1):
        rest = tuple(one for one in columns if one not in (columns[0], *others))
        found += [(columns[0], *others, *tail) for tail in partitions(rest, block)]
    return found


@pytest.mark.parametrize("is_transposable", [False, True])
@pytest.mark.parametrize(
    ("columns", "pattern", "count"), [(8, "2:4", 35), (12, "2:4", 5775), (8, "1:4", 35), (8, "1:2", 105)]
)
def test_it_finds_the_optimum_of_tiny_matrices(columns: int, pattern: str, count: int, is_transposable: bool) -> None:
    parsed = NMPattern.parse(pattern)
    matrix = torch.randn(12, columns).abs()
    ways = partitions(tuple(range(columns)), parsed.block)
    assert len(ways) == count
    ways = ways[:: 1 if count < 1000 or not is_transposable else 8]
    best = max(kept(matrix, torch.tensor(way), parsed, is_transposable) for way in ways)
    order = find_order([Scores(matrix.T.contiguous(), parsed, is_transposable)])
    assert sorted(order.tolist()) == list(range(columns))
    assert kept(matrix, order, parsed, is_transposable) >= best * (1 - 1e-6)


@pytest.mark.parametrize("is_transposable", [False, True])
def test_gains_and_kept_sums_are_those_of_the_operators(is_transposable: bool) -> None:
    matrix = torch.randn(16, 24).abs().double()
    scores = Scores(matrix.T.contiguous(), TWO_FOUR, is_transposable)
    blocks = torch.randperm(24).reshape(6, 4)
    assert float(scores.kept(blocks).sum()) == pytest.approx(kept(matrix, blocks.flatten(), TWO_FOUR, is_transposable))
    gains = scores.gains(blocks[None, :, 0], blocks[None, :, 1:])[0]
    moved = blocks.clone()
    moved[:, 0] = blocks[[1, 2, 3, 4, 5, 0], 0]
    difference = gains[[1, 2, 3, 4, 5, 0], range(6)].sum() - gains.trace()
    assert float(difference) == pytest.approx(float(scores.kept(moved).sum() - scores.kept(blocks).sum()))


def test_it_leaves_a_local_optimum_of_swaps() -> None:
    # Three rows of blocks whose best order is a cycle of three columns: each single swap loses.
    torch.manual_seed(3)
    better = 0
    for _ in range(20):
        matrix = torch.randn(8, 16).abs()
        order = swapped_greedily(matrix)
        found = find_order([Scores(matrix.T.contiguous(), TWO_FOUR)])
        assert kept(matrix, found, TWO_FOUR, False) >= kept(matrix, order, TWO_FOUR, False) * (1 - 0.01)
        better += kept(matrix, found, TWO_FOUR, False) > kept(matrix, order, TWO_FOUR, False) * (1 + 1e-6)
    assert better >= 10


def swapped_greedily(matrix: Tensor) -> Tensor:
    """Swap the best pair of columns until no pair gains."""
    order = torch.arange(matrix.shape[1])
    while True:
        best, chosen = kept(matrix, order, TWO_FOUR, False) * (1 + 1e-7), None
        for a, b in combinations(range(len(order)), 2):
            other = order.clone()
            other[[a, b]] = order[[b, a]]
            if (value := kept(matrix, other, TWO_FOUR, False)) > best:
                best, chosen = value, other
        if chosen is None:
            return order
        order = chosen


@given(st.integers(0, 1 << 30), st.sampled_from(["2:4", "1:4", "4:8", "1:2"]), st.booleans())
@settings(deadline=None, derandomize=True, database=None, max_examples=30)
def test_no_order_is_worse_than_the_first(seed: int, pattern: str, is_transposable: bool) -> None:
    parsed = NMPattern.parse(pattern)
    matrix = torch.rand(8, 5 * parsed.block, generator=torch.Generator().manual_seed(seed))
    scores = Scores(matrix.T.contiguous(), parsed, is_transposable)
    order = find_order([scores], 1 << 20)
    first = torch.arange(len(order)).reshape(-1, parsed.block)
    assert scores.kept(order.reshape(first.shape)).sum() >= scores.kept(first).sum() * (1 - 1e-6)
    assert torch.equal(order, find_order([scores], 1 << 20))


def test_a_budget_bounds_the_search_of_many_rows() -> None:
    matrix = torch.rand(64, 4096)
    order = find_order([Scores(matrix, TWO_FOUR)], 1 << 20)
    assert sorted(order.tolist()) == list(range(64))


@given(st.integers(1, 12), st.integers(0, 1 << 30))
@settings(deadline=None, derandomize=True, database=None)
def test_assignments_are_optimal(size: int, seed: int) -> None:
    problems = np.random.default_rng(seed).normal(size=(3, size, size)) * np.array([1e-3, 1, 1e3])[:, None, None]
    for gains, columns in zip(problems, assign(torch.from_numpy(problems)).numpy(), strict=True):
        assert sorted(columns) == list(range(size))
        expected = gains[linear_sum_assignment(gains, maximize=True)].sum()
        # Gains that are rounding beside the largest of all problems are left.
        assert gains[columns, np.arange(size)].sum() == pytest.approx(expected, abs=1e-4)
