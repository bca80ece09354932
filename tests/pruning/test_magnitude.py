from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmcompile.pruning import OPERATORS, NMPattern, greedy, greedy_by_value, mask
from nmcompile.pruning.selection import PAIRWISE_LIMIT, largest


def best_by_enumeration(scores: Tensor, n_keep: int) -> tuple[int, ...]:
    """Return the N positions with the largest sum; `combinations` is lexicographic, so the first of equals wins."""
    values = scores.tolist()
    return max(combinations(range(len(values)), n_keep), key=lambda kept: sum(values[i] for i in kept))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "1:4", "3:5"])
@pytest.mark.parametrize("values", [1000, 3])
def test_greedy_is_the_best_of_all_masks(pattern: str, values: int) -> None:
    parsed = NMPattern.parse(pattern)
    x = torch.randint(-values, values + 1, (40, parsed.block), generator=torch.Generator().manual_seed(0)).float()
    for block, pruned in zip(x, greedy(x, pattern), strict=True):
        kept = torch.zeros(parsed.block, dtype=torch.bool)
        kept[list(best_by_enumeration(block.abs(), parsed.n_keep))] = True
        assert pruned.equal(torch.where(kept, block, 0.0))


def test_greedy_by_value_keeps_the_sign() -> None:
    x = torch.tensor([[-9.0, 1.0, 2.0, -1.0], [-4.0, -3.0, -2.0, -1.0]])
    expected = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, -2.0, -1.0]])
    assert greedy_by_value(x, "2:4").equal(expected)
    assert greedy_by_value(x.relu(), "2:4").equal(greedy(x.relu(), "2:4"))


def test_ties_go_to_the_lowest_index() -> None:
    ties = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 2.0, -2.0, 2.0]])
    assert greedy(ties, "2:4").equal(torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 2.0, -2.0, 0.0]]))
    assert mask(torch.zeros(1, 4), "2:4").tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("block", [PAIRWISE_LIMIT, PAIRWISE_LIMIT + 1, 64])
def test_both_ways_to_rank_agree(block: int) -> None:
    scores = torch.randint(0, 9, (block, 500), generator=torch.Generator().manual_seed(1)).float()
    order = sorted(range(block), key=lambda i: -scores[i, 0])
    kept = largest(scores, block // 2)
    assert kept[:, 0].nonzero().flatten().tolist() == sorted(order[: block // 2])
    assert (kept.sum(0) == block // 2).all()


@pytest.mark.parametrize("name", ["greedy", "greedy_by_value"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kept_elements_are_the_originals_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    x = torch.randint(-(2**15), 2**15, (64, 64), generator=generator, dtype=torch.int16).to(bits)
    x = (x << (8 * dtype.itemsize - 16)).view(dtype)  # includes NaN payloads, infinities, -0.0 and subnormals
    kept = OPERATORS[name].mask(x, "2:4")
    assert (kept.view(64, 16, 4).sum(-1) == 2).all()
    assert OPERATORS[name](x, "2:4").view(bits).equal(torch.where(kept, x.view(bits), 0))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@given(st.lists(floats, min_size=1, max_size=19), st.sampled_from(["1:2", "2:4", "4:8", "2:3"]))
def test_properties(values: list[float], pattern: str) -> None:
    x = torch.tensor(values)
    parsed = NMPattern.parse(pattern)
    pruned = greedy(x, pattern)
    assert greedy(pruned, pattern).equal(pruned)
    for block in torch.split(pruned, parsed.block):
        assert block.count_nonzero() <= parsed.n_keep
    assert x.count_nonzero() == 0 or pruned.abs().max() == x.abs().max()
    small = torch.where(x.abs() < 1e30, x, 0.0).where(x.abs() > 1e-30, 0.0)
    assert mask(small * 2.0**-20, pattern).equal(mask(small, pattern))
    assert mask(-small, pattern).equal(mask(small, pattern))


def test_mask_is_where_greedy_keeps() -> None:
    x = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(3))
    assert greedy(x, "2:4", dim=1).equal(torch.where(mask(x, "2:4", dim=1), x, 0.0))
    assert mask(x, "2:4", dim=1).sum() == 6 * 4 * (2 + 2 + 2)
