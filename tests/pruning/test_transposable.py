from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from nmcompile.errors import ConfigError, OperandError
from nmcompile.pruning import NMPattern, transposable_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def all_patterns(n_keep: int, block: int) -> Tensor:
    """Return every valid tile in lexicographic order of its rows, bool `(patterns, M, M)`."""
    tiles = [
        [[column in row for column in range(block)] for row in rows]
        for rows in product(combinations(range(block), n_keep), repeat=block)
        if all(sum(column in row for row in rows) == n_keep for column in range(block))
    ]
    return torch.tensor(tiles)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_sum(w: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, w.double().abs(), 0.0).sum((-2, -1))


def is_transposable(mask: Tensor, n_keep: int, block: int, dims: tuple[int, int] = (-2, -1)) -> bool:
    return all(
        bool((torch.stack([piece.sum(dim) for piece in torch.split(mask, block, dim)]) == n_keep).all()) for dim in dims
    )


def test_there_are_ninety_patterns() -> None:
    assert len(all_patterns(2, 4)) == 90


@pytest.mark.parametrize(("n_keep", "block"), [(2, 4), (1, 2), (1, 4), (3, 4), (1, 3), (2, 3)])
def test_exact_is_the_best_pattern(n_keep: int, block: int) -> None:
    w = noise(2000, block, block)
    mask = transposable_mask(w, f"{n_keep}:{block}")
    assert is_transposable(mask, n_keep, block)
    sums = torch.einsum("trc,prc->tp", w.double().abs(), all_patterns(n_keep, block).double())
    torch.testing.assert_close(kept_sum(w, mask), sums.amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n_keep", "block"), [(2, 4), (1, 2), (1, 4), (3, 4), (1, 3)])
def test_ties_go_to_the_first_pattern(n_keep: int, block: int) -> None:
    w = torch.randint(0, 3, (3000, block, block), generator=torch.Generator().manual_seed(1)).float()
    patterns = all_patterns(n_keep, block)
    sums = torch.einsum("trc,prc->tp", w, patterns.float())
    first = (sums == sums.amax(1, keepdim=True)).int().argmax(1)
    assert transposable_mask(w, f"{n_keep}:{block}").equal(patterns[first])


def best_by_integer_program(tile: Tensor, n_keep: int) -> float:
    block = tile.shape[0]
    sums = np.concatenate([np.kron(np.eye(block), np.ones(block)), np.kron(np.ones(block), np.eye(block))])
    limits = LinearConstraint(sums, n_keep, n_keep)
    cost = -tile.double().abs().flatten().numpy()
    result = milp(cost, constraints=limits, bounds=Bounds(0, 1), integrality=np.ones(block**2, dtype=np.int64))
    assert result.fun is not None
    return -float(result.fun)


@pytest.mark.parametrize(("n_keep", "block"), [(4, 8), (2, 8), (2, 5), (5, 6)])
def test_flow_is_the_optimum(n_keep: int, block: int) -> None:
    w = noise(12, block, block, seed=2)
    w[0] = w[0].round()
    w[1] *= 10.0 ** noise(block, block, seed=3)
    w[2, 0, 0] = 2.0  # an integer among fractions
    mask = transposable_mask(w, f"{n_keep}:{block}")
    assert is_transposable(mask, n_keep, block)
    for tile, kept in zip(w, mask, strict=True):
        assert float(kept_sum(tile, kept)) == pytest.approx(best_by_integer_program(tile, n_keep), rel=1e-6)


def test_flow_bears_any_range_of_magnitudes() -> None:
    """A dominant permutation is found whatever its scale: costs are exact integers."""
    w = noise(3, 6, 6, seed=5).abs() * torch.tensor([1e-42, 1.0, 1e30]).view(3, 1, 1)
    columns = torch.tensor([3, 0, 5, 1, 4, 2])
    w[:, torch.arange(6), columns] += torch.tensor([1e-38, 1e20, 2e34]).view(3, 1)
    mask = transposable_mask(w, "2:6")
    assert mask[:, torch.arange(6), columns].all()
    assert is_transposable(mask, 2, 6)


def test_flow_finds_every_permutation() -> None:
    w = noise(4, 5, 5, seed=4)
    for tile, kept in zip(w, transposable_mask(w, "1:5"), strict=True):
        best = max(permutations(range(5)), key=lambda columns: sum(float(tile[r, columns[r]].abs()) for r in range(5)))
        assert kept.int().argmax(1).tolist() == list(best)


@pytest.mark.parametrize(("n_keep", "block"), [(1, 2), (2, 4), (4, 8), (1, 4)])
def test_greedy_keeps_at_least_half_the_optimum(n_keep: int, block: int) -> None:
    w = noise(200 if block <= 4 else 20, block, block)
    greedy = transposable_mask(w, f"{n_keep}:{block}", method="greedy")
    assert greedy.sum(-1).max() <= n_keep and greedy.sum(-2).max() <= n_keep
    exact = kept_sum(w, transposable_mask(w, f"{n_keep}:{block}"))
    assert (kept_sum(w, greedy) >= exact / 2).all()
    assert kept_sum(w, greedy).sum() < exact.sum()  # a single tile may gain by leaving a row short


def greedy_tile(tile: Tensor, n_keep: int) -> Tensor:
    block = tile.shape[0]
    mask = torch.zeros(block, block, dtype=torch.bool)
    for index in sorted(range(block * block), key=lambda i: -abs(float(tile.flatten()[i]))):
        row, column = divmod(index, block)
        if mask[row].sum() < n_keep and mask[:, column].sum() < n_keep:
            mask[row, column] = True
    return mask


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3"])
def test_greedy_takes_elements_in_descending_order(pattern: str) -> None:
    parsed = NMPattern.parse(pattern)
    w = noise(30, parsed.block, parsed.block)
    w[:10] = w[:10].round()
    masks = transposable_mask(w, pattern, method="greedy")
    for tile, mask in zip(w, masks, strict=True):
        assert mask.equal(greedy_tile(tile, parsed.n_keep))
    dense = transposable_mask(noise(500, 4, 4), "2:4", method="greedy").sum((-2, -1))
    assert dense.min() < 8 and dense.max() == 8  # greedy may leave rows short


@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (-2, -1), (0, 3), (2, 1)])
def test_any_two_dims(dims: tuple[int, int], method: str) -> None:
    w = noise(8, 12, 4, 16)
    mask = transposable_mask(w, "2:4", dims=dims, method=method)
    moved = transposable_mask(w.movedim(dims, (-2, -1)).contiguous(), "2:4", method=method)
    assert mask.movedim(dims, (-2, -1)).equal(moved)
    assert method == "greedy" or is_transposable(mask, 2, 4, dims)


@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_dtypes(dtype: torch.dtype, method: str) -> None:
    w = noise(8, 16, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    mask = transposable_mask(w, "2:4", dims=(0, 1), method=method)
    assert mask.dtype == torch.bool and mask.stride() == w.stride()
    plain = torch.nn.Parameter(w.contiguous().double())
    assert mask.equal(transposable_mask(plain, "2:4", dims=(0, 1), method=method))


@pytest.mark.parametrize("shape", [(5, 6), (1, 1), (4, 7), (9, 4), (2, 3, 3)])
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "4:8"])
@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_partial_tiles_keep_at_most_n(shape: tuple[int, ...], pattern: str, method: str) -> None:
    parsed, w = NMPattern.parse(pattern), noise(*shape)
    mask = transposable_mask(w, pattern, method=method)
    rows, columns = -shape[-2] % parsed.block, -shape[-1] % parsed.block
    padded = transposable_mask(torch.nn.functional.pad(w, (0, columns, 0, rows)), pattern, method=method)
    assert mask.equal(padded[..., : shape[-2], : shape[-1]])
    assert mask.any()
    for dim in (-2, -1):
        assert all((piece.sum(dim) <= parsed.n_keep).all() for piece in torch.split(mask, parsed.block, dim))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("pattern", "block"), [("2:4", 4), ("1:2", 2), ("2:5", 5)])
@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_non_finite_elements_rank_first(value: float, pattern: str, block: int, method: str) -> None:
    w = noise(block * block, block, block)
    places = torch.arange(block * block)
    w.view(-1, block * block)[places, places] = value
    mask = transposable_mask(w, pattern, method=method)
    assert mask.view(-1, block * block)[places, places].all()
    huge = torch.full((block, block), 3e38)
    assert transposable_mask(huge, pattern, method=method).sum(0).max() == NMPattern.parse(pattern).n_keep


def test_finite_elements_still_count_beside_an_infinity() -> None:
    w = noise(200, 4, 4)
    w[:, 0, 0] = torch.inf
    patterns = all_patterns(2, 4)
    patterns = patterns[patterns[:, 0, 0]]
    sums = torch.einsum("trc,prc->tp", w.nan_to_num(posinf=0).double().abs(), patterns.double())
    kept = kept_sum(w.nan_to_num(posinf=0), transposable_mask(w, "2:4"))
    torch.testing.assert_close(kept, sums.amax(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_an_infinity_among_zeros(method: str) -> None:
    w = torch.zeros(4, 4)
    w[0, 3] = w[3, 3] = torch.inf
    assert transposable_mask(w, "2:4", method=method)[[0, 3], [3, 3]].all()


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "2:5"])
def test_sums_that_would_overflow(pattern: str) -> None:
    w = torch.rand(10, 20, 20, generator=torch.Generator().manual_seed(6)) * 2.0**127
    assert transposable_mask(w[:1], pattern).equal(transposable_mask(w[:1] * 2.0**-30, pattern))


def test_zero_and_empty_weights() -> None:
    assert is_transposable(transposable_mask(torch.zeros(8, 8), "2:4"), 2, 4)
    assert is_transposable(transposable_mask(torch.zeros(8, 8), "4:8"), 4, 8)
    for shape in [(0, 4), (4, 0), (0, 0), (0, 4, 4)]:
        assert transposable_mask(torch.empty(shape), "2:4").shape == shape


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**60), max_value=2.0**60), min_size=16, max_size=16)
)
def test_scaling_and_transposing(values: list[float]) -> None:
    w = torch.tensor(values, dtype=torch.float64).view(4, 4)
    mask = transposable_mask(w, "2:4")
    assert mask.equal(transposable_mask(w * 2.0**20, "2:4"))
    assert mask.equal(transposable_mask(-w, "2:4"))
    assert float(kept_sum(w, mask)) == pytest.approx(float(kept_sum(w.t(), transposable_mask(w.t(), "2:4"))))


def test_many_tiles_are_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w = noise(40, 40)
    whole = [transposable_mask(w, "2:4", method=method) for method in ("exact", "greedy")]
    monkeypatch.setattr("nmcompile.pruning.transposable.CHUNK", 7 * 16)
    assert all(map(torch.equal, whole, [transposable_mask(w, "2:4", method=method) for method in ("exact", "greedy")]))


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"'exakt'.*did you mean 'exact'"):
        transposable_mask(noise(4, 4), "2:4", method="exakt")
    with pytest.raises(OperandError, match="same dim"):
        transposable_mask(noise(4, 4), "2:4", dims=(1, -1))
    with pytest.raises(OperandError, match="dim -2"):
        transposable_mask(noise(4), "2:4")
    with pytest.raises(OperandError, match="convert"):
        transposable_mask(torch.ones(4, 4, dtype=torch.int32), "2:4")
    with pytest.raises(ConfigError, match="1 <= N < M"):
        transposable_mask(noise(4, 4), "4:4")
