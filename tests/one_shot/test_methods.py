"""Every method against an independent implementation: equal masks, equal weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmcompile.one_shot.refit import refit
from nmcompile.one_shot.select import Selector
from nmcompile.one_shot.solve import METHODS, solve
from nmcompile.pruning.pattern import NMPattern
from tests.one_shot import oracles
from tests.one_shot.correlated import correlated, hessian_of, linear

PATTERNS = ("1:2", "2:4", "1:4", "3:4")


def mean_of(x: Tensor) -> oracles.Array:
    return (x.T @ x / len(x)).numpy()


def is_pattern(mask: Tensor, pattern: NMPattern, is_transposable: bool) -> bool:
    rows, columns = mask.shape
    tiles = mask.reshape(
        rows // pattern.block if is_transposable else rows, -1, columns // pattern.block, pattern.block
    )
    counts = [tiles.sum(-1)] + ([tiles.sum(1)] if is_transposable else [])
    return all(bool((count == pattern.n_keep).all()) for count in counts)


@pytest.mark.parametrize("is_transposable", [False, True])
@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_sorts_weights_by_magnitude_times_norm(text: str, is_transposable: bool) -> None:
    pattern = NMPattern.parse(text)
    weight, x = torch.randn(8, 16, dtype=torch.float64), correlated(64, 16)
    scores = (weight.abs() * x.norm(dim=0)).numpy()
    solution = solve("wanda", linear(8, 16), weight, hessian_of(x), pattern, is_transposable)
    expected = oracles.best_mask(scores, pattern.n_keep, pattern.block, is_transposable)
    assert (solution.mask.numpy() == expected).all()
    assert torch.equal(solution.weight, weight * solution.mask)


@given(
    text=st.sampled_from(PATTERNS),
    is_transposable=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    tokens=st.integers(1, 80),
    unused=st.booleans(),
    panel=st.sampled_from([1, 8, 128]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_sparsegpt_is_the_surgeon_with_full_inverses(
    text: str, is_transposable: bool, shape: tuple[int, int], tokens: int, unused: bool, panel: int, seed: int
) -> None:
    torch.manual_seed(seed)
    pattern = NMPattern.parse(text)
    rows, columns = (4 * n for n in shape)
    weight, x = torch.randn(rows, columns, dtype=torch.float64), correlated(tokens, columns)
    x[:, 1] *= not unused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmcompile.one_shot.sparsegpt.PANEL", panel)
        solution = solve("sparsegpt", linear(rows, columns), weight, hessian_of(x), pattern, is_transposable)
    kept, mask = oracles.prune_by_surgeon(weight.numpy(), mean_of(x), pattern.n_keep, pattern.block, is_transposable)
    assert (solution.mask.numpy() == mask).all()
    np.testing.assert_allclose(solution.weight.numpy(), kept, rtol=1e-7, atol=1e-9)


@given(
    text=st.sampled_from(PATTERNS),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    tokens=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_refit_is_least_squares(text: str, shape: tuple[int, int], tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows, columns = shape[0], 4 * shape[1]
    x = correlated(tokens, columns)
    matrix = hessian_of(x).damped()
    np.testing.assert_allclose(matrix[0].numpy(), oracles.damped(mean_of(x)), rtol=1e-12)
    dense = torch.randn(1, rows, columns, dtype=torch.float64)
    mask = Selector(NMPattern.parse(text), False)(torch.rand_like(dense))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmcompile.one_shot.refit.TOLERANCE", 1e-12)
        fitted = refit(dense, mask, matrix, torch.randn_like(dense))
    assert (fitted[~mask] == 0).all()
    best = oracles.least_squares(dense[0].numpy(), mask[0].numpy(), matrix[0].numpy())
    np.testing.assert_allclose(fitted[0].numpy(), best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refit_ends_with_a_small_residual(dtype: torch.dtype) -> None:
    matrix = hessian_of(correlated(512, 256)).damped().to(dtype)
    dense = torch.randn(1, 32, 256, dtype=dtype)
    mask = Selector(NMPattern(2, 4), False)(dense.abs())
    fitted = refit(dense, mask, matrix, dense).double()
    scale = matrix.double().diagonal(dim1=1, dim2=2).sqrt().unsqueeze(1)
    target, image = ((one.double() @ matrix.double()) * mask / scale for one in (dense, fitted))
    assert ((target - image).norm(dim=-1) <= 1.1e-4 * target.norm(dim=-1)).all()


def test_admm_is_near_the_best_of_all_masks() -> None:
    """Row-wise 2:4 of 8 x 8: each of a row's 36 masks with the least-squares values."""
    pattern, ratios = NMPattern(2, 4), []
    for _ in range(20):
        weight, x = torch.randn(8, 8, dtype=torch.float64), correlated(32, 8)
        hessian = hessian_of(x)
        matrix, dense = hessian.damped()[0].numpy(), weight.numpy()
        solution = solve("admm", linear(8, 8), weight, hessian, pattern, False)
        tried = [np.broadcast_to(mask, dense.shape) for mask in oracles.row_masks(2, 4, 8)]
        losses = np.stack([oracles.loss(dense, oracles.least_squares(dense, mask, matrix), matrix) for mask in tried])
        lost, least = oracles.loss(dense, solution.weight.numpy(), matrix), losses.min(0)
        assert (lost >= least * (1 - 1e-9)).all()
        ratios.append(lost.sum() / least.sum())
    assert np.mean(ratios) < 1.1


def test_transposable_admm_is_near_the_best_of_all_masks() -> None:
    """Transposable 2:4 of 4 x 8: all 90 x 90 masks; a row's loss depends on its own mask alone."""
    pattern, ratios = NMPattern(2, 4), []
    rows = oracles.row_masks(2, 4, 8)
    numbers = {mask.tobytes(): number for number, mask in enumerate(rows)}
    tiles = oracles.tile_masks(2, 4)
    pairs = [[numbers[np.concatenate([a[row], b[row]]).tobytes()] for row in range(4)] for a in tiles for b in tiles]
    for _ in range(20):
        weight, x = torch.randn(4, 8, dtype=torch.float64), correlated(32, 8)
        hessian = hessian_of(x)
        matrix, dense = hessian.damped()[0].numpy(), weight.numpy()
        solution = solve("admm", linear(4, 8), weight, hessian, pattern, True)
        tried = [np.broadcast_to(mask, dense.shape) for mask in rows]
        losses = np.stack([oracles.loss(dense, oracles.least_squares(dense, mask, matrix), matrix) for mask in tried])
        least = losses[np.array(pairs), np.arange(4)].sum(1).min()
        lost = oracles.loss(dense, solution.weight.numpy(), matrix).sum()
        assert lost >= least * (1 - 1e-9)
        ratios.append(lost / least)
    assert np.mean(ratios) < 1.4


@pytest.mark.parametrize("is_transposable", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_methods_leave_less_error_in_this_order(shape: tuple[int, int], is_transposable: bool) -> None:
    weight, x = torch.randn(shape), correlated(1024, shape[1], torch.float32)
    hessian, pattern = hessian_of(x), NMPattern(2, 4)
    order = [("magnitude", False), ("wanda", False), ("sparsegpt", False), ("sparsegpt", True), ("admm", False)]
    solutions = [solve(name, linear(*shape), weight, hessian, pattern, is_transposable, fit) for name, fit in order]
    errors = [solution.error for solution in solutions]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.98 * errors[-2]
    for solution in solutions:
        assert is_pattern(solution.mask, pattern, is_transposable)
        assert (solution.weight[~solution.mask] == 0).all()
        expected = (x @ (weight - solution.weight).T).norm() / (x @ weight.T).norm()
        assert solution.error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("is_transposable", [False, True])
@pytest.mark.parametrize("text", ["4:8", "1:8", "8:16"])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_any_size(method: str, text: str, is_transposable: bool) -> None:
    pattern = NMPattern.parse(text)
    weight, x = torch.randn(32, 48), correlated(256, 48, torch.float32)
    solution = solve(method, linear(32, 48), weight, hessian_of(x), pattern, is_transposable)
    assert is_pattern(solution.mask, pattern, is_transposable)
    assert (solution.weight[~solution.mask] == 0).all()
    assert 0 < solution.error < 1
