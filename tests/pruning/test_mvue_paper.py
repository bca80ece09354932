import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmcompile.pruning import OPERATORS, NMPattern
from nmcompile.pruning.minimum_variance import sample
from nmcompile.pruning.mvue_paper import PAIRS, select_approx, select_one_of_two, select_pairs
from nmcompile.pruning.selection import Selection

EDGES = [0.0, 2.0**-24, 0.5, 1 - 2.0**-23, 1 - 2.0**-24]


def pruned(selection: Selection) -> Tensor:
    assert selection.values is not None
    return torch.where(selection.mask, selection.values, 0.0)


def blocks_of_four(count: int = 300) -> Tensor:
    """Return float64 blocks `(4, count)` of all three cases of A.2."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, count, generator=generator, dtype=torch.float64) ** 1.5


def paper_pairs(block: list[float]) -> dict[tuple[int, int], float]:
    """Compute Equations (37), (39), (40), on the sorted block; indices from 0."""
    a1, a2, a3, a4 = sorted(block)
    total = a1 + a2 + a3 + a4
    if a4 >= a1 + a2 + a3:
        rest = a1 + a2 + a3
        weights = (0.0, 0.0, a1 / rest, 0.0, a2 / rest, a3 / rest)
    elif a4 <= 2 * a1 + a3:
        double = 2 * total
        weights = (
            0.0,
            (2 * a1 + a3 - a4) / double,
            (2 * a1 - a3 + a4) / double,
            (2 * a2 + a3 - a4) / double,
            (2 * a2 - a3 + a4) / double,
            (-a1 - a2 + a3 + a4) / total,
        )
    else:
        weights = (
            0.0,
            0.0,
            2 * a1 / total,
            (a1 + a2 + a3 - a4) / total,
            (-a1 + a2 - a3 + a4) / total,
            (-a1 - a2 + a3 + a4) / total,
        )
    return dict(zip(PAIRS, weights, strict=True))


def test_pairs_are_drawn_as_in_the_appendix() -> None:
    steps, count = 4000, 150
    blocks = blocks_of_four(count)
    u = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).repeat(count).unsqueeze(0)
    mask = select_pairs(blocks.repeat_interleave(steps, dim=1), NMPattern(2, 4), u).mask.view(4, count, steps)
    for b in range(count):
        order = blocks[:, b].argsort().tolist()
        for (i, j), probability in paper_pairs(blocks[:, b].tolist()).items():
            share = (mask[order[i], b] & mask[order[j], b]).double().mean()
            assert abs(share - probability) <= 2 / steps


def test_pairs_and_systematic_sampling_have_the_same_marginals_and_values() -> None:
    blocks = blocks_of_four()
    saturated, _, step = sample(blocks, 2, torch.zeros(300, dtype=torch.float64))
    values = select_pairs(blocks, NMPattern(2, 4), torch.zeros(1, 300, dtype=torch.float64)).values
    torch.testing.assert_close(values, torch.where(saturated, blocks, step))
    marginals = torch.zeros_like(blocks)
    for b in range(300):
        order = blocks[:, b].argsort().tolist()
        for (i, j), probability in paper_pairs(blocks[:, b].tolist()).items():
            marginals[order[i], b] += probability
            marginals[order[j], b] += probability
    torch.testing.assert_close(marginals, torch.where(saturated, 1.0, blocks / step))


def test_pairs_cover_all_cases() -> None:
    cases = [0, 0, 0]
    for a in blocks_of_four().sort(0).values.t().tolist():
        cases[2 if a[3] >= a[0] + a[1] + a[2] else 0 if a[3] <= 2 * a[0] + a[2] else 1] += 1
    assert min(cases) > 20


values = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
uniform = st.sampled_from(EDGES)


@settings(deadline=None, max_examples=300)
@given(st.lists(values, min_size=4, max_size=4), uniform, uniform, st.booleans())
def test_exactly_two_are_kept(block: list[float], first: float, second: float, tie: bool) -> None:
    x = torch.tensor(block if not tie else [block[0], block[1], block[0], block[1]]).unsqueeze(1)
    u = torch.tensor([[first], [second]])
    for select in (select_pairs, select_approx):
        result = pruned(select(x, NMPattern(2, 4), u))
        assert result.count_nonzero() == min(2, int(x.count_nonzero()))
        assert (result.sign() * x.sign() >= 0).all()
        assert (result.abs() >= 0.99 * x.abs()).where(result != 0, True).all()


@settings(deadline=None, max_examples=200)
@given(values, values, uniform)
def test_exactly_one_is_kept(first: float, second: float, u: float) -> None:
    x = torch.tensor([[first], [second]])
    result = pruned(select_one_of_two(x, NMPattern(1, 2), torch.tensor([[u]])))
    assert result.count_nonzero() == min(1, int(x.count_nonzero()))
    if result.count_nonzero():
        assert result.abs().max() == x.abs().sum()


def test_probabilities_that_round_to_nothing_still_keep_n() -> None:
    spread = torch.tensor([2.0**100, 2.0**-140, 2.0**-140, 0.0]).unsqueeze(1)
    for u in EDGES:
        result = pruned(select_approx(spread, NMPattern(2, 4), torch.full((2, 1), u)))
        assert result.count_nonzero() == 2
    tiny = torch.tensor([[2.0**-149], [0.0]])
    assert pruned(select_one_of_two(tiny, NMPattern(1, 2), torch.tensor([[EDGES[-1]]]))).equal(tiny)


@pytest.mark.parametrize(("u", "expected"), [(0.0, 0), (0.2499, 0), (0.25, 1), (0.9, 1)])
def test_one_of_two_keeps_the_first_below_its_probability(u: float, expected: int) -> None:
    result = pruned(select_one_of_two(torch.tensor([[1.0], [-3.0]]), NMPattern(1, 2), torch.tensor([[u]])))
    assert result[:, 0].tolist() == ([4.0, 0.0] if expected == 0 else [0.0, -4.0])


def test_approx_draws_in_two_steps() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).unsqueeze(1)
    for u, kept in [((0.05, 0.0), {0, 1}), ((0.35, 0.1), {2, 0}), ((0.95, 0.99), {3, 2}), ((0.15, 0.2), {1, 2})]:
        mask = select_approx(x, NMPattern(2, 4), torch.tensor(u).unsqueeze(1)).mask[:, 0]
        assert set(mask.nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("name", ["mvue_pairs", "mvue_approx"])
def test_any_scale(name: str, scale: float) -> None:
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(1)) * scale
    result = OPERATORS[name](x, "2:4", generator=torch.Generator().manual_seed(2))
    assert result.isfinite().all()
    assert (result.count_nonzero(1) == 2).all()
