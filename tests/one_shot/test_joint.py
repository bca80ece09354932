"""Pruning and rounding to a grid together: against plain formulas, all masks with all values, and the exact methods."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmcompile.ir.layers import conv_layer
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.refit import refit
from nmcompile.one_shot.refit_on_grid import refit_on_grid
from nmcompile.one_shot.rounding import Rounding
from nmcompile.one_shot.select import Selector
from nmcompile.one_shot.solve import METHODS, solve
from nmcompile.one_shot.sparsegpt import round_kept
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid, sawb_scale
from tests.one_shot import oracles
from tests.one_shot.correlated import correlated, hessian_of, linear

TWO_FOUR = NMPattern(2, 4)
FOUR_BITS = Grid(4, signed=True)


def mean_of(x: Tensor) -> oracles.Array:
    return (x.T @ x / len(x)).numpy()


def sawb(weight: Tensor, dim: int | None = None) -> Rounding:
    return Rounding(FOUR_BITS, sawb_scale(weight, 4, dim=dim))


@given(
    text=st.sampled_from(["1:2", "2:4", "3:4"]),
    is_transposable=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    tokens=st.integers(1, 80),
    by_channel=st.booleans(),
    panel=st.sampled_from([1, 8, 128]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_joint_sparsegpt_is_the_surgeon_that_rounds(
    text: str,
    is_transposable: bool,
    shape: tuple[int, int],
    tokens: int,
    by_channel: bool,
    panel: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    pattern = NMPattern.parse(text)
    rows, columns = (4 * n for n in shape)
    weight, x = torch.randn(rows, columns, dtype=torch.float64), correlated(tokens, columns)
    given = sawb(weight, 0 if by_channel else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmcompile.one_shot.sparsegpt.PANEL", panel)
        found = solve("sparsegpt", linear(rows, columns), weight, hessian_of(x), pattern, is_transposable, False, given)
    assert found.step is not None and found.step.shape == given.step.shape
    step = found.step.flatten().numpy()
    kept, mask = oracles.prune_by_surgeon(
        weight.numpy(),
        mean_of(x),
        pattern.n_keep,
        pattern.block,
        is_transposable,
        lambda column: oracles.on_grid(column, step, 7),
    )
    assert (found.mask.numpy() == mask).all()
    np.testing.assert_allclose(found.weight.numpy(), kept, rtol=1e-12)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
@pytest.mark.parametrize("with_refit", [False, True])
def test_no_method_beats_all_masks_with_all_values(method: str, with_refit: bool) -> None:
    """2:4 of rows of eight on seven levels: 36 masks with 7⁴ values each; the methods come near the best of them."""
    grid, ratios = Grid(3, signed=True), []
    for _ in range(4):
        weight, x = torch.randn(3, 8, dtype=torch.float64), correlated(64, 8)
        hessian = hessian_of(x)
        rounding = Rounding(grid, sawb_scale(weight, 3))
        found = solve(method, linear(3, 8), weight, hessian, TWO_FOUR, False, with_refit, rounding)
        matrix = hessian.damped()[0].numpy()
        assert found.step is not None
        masks, step = oracles.row_masks(2, 4, 8), float(found.step)
        least = oracles.least_loss_on_grid(weight.numpy(), matrix, masks, step, 3)
        lost = oracles.loss(weight.numpy(), found.weight.numpy(), matrix)
        assert (lost >= least * (1 - 1e-9)).all()
        ratios.append(lost.sum() / least.sum())
    assert np.mean(ratios) < 2.0 if with_refit or method == "admm" else 2.5


@pytest.mark.parametrize("is_transposable", [False, True])
def test_an_infinitely_fine_grid_changes_nothing(is_transposable: bool) -> None:
    class Fine(Grid):
        @property
        def high(self) -> int:
            return 2**40

    weight, x = torch.randn(16, 32, dtype=torch.float64), correlated(128, 32)
    rounding = Rounding(Fine(8, signed=True), torch.tensor(2.0**-32, dtype=torch.float64))
    arguments = linear(16, 32), weight, hessian_of(x), TWO_FOUR, is_transposable
    exact, fine = solve("sparsegpt", *arguments), solve("sparsegpt", *arguments, False, rounding)
    assert torch.equal(exact.mask, fine.mask)
    torch.testing.assert_close(fine.weight, exact.weight, rtol=0, atol=1e-7)
    exact, fine = solve("sparsegpt", *arguments, True), solve("sparsegpt", *arguments, True, rounding)
    assert fine.error == pytest.approx(exact.error, rel=0.05)  # the sweeps stop where no single weight gains


def test_sweeps_end_where_no_change_of_one_weight_helps() -> None:
    weight, x = torch.randn(6, 24, dtype=torch.float64), correlated(96, 24)
    hessian, rounding = hessian_of(x), sawb(weight)
    round, matrix = rounding.of(linear(6, 24)), hessian.damped()
    mask = Selector(TWO_FOUR, False)(weight[None].abs())
    start = round_kept(weight[None], mask, hessian, round)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmcompile.one_shot.refit_on_grid.PANEL", 7)
        found = refit_on_grid(weight[None], mask, matrix, start, round)
    dense, step = weight.numpy(), float(rounding.step)
    least = oracles.loss(dense, found[0].numpy(), matrix[0].numpy())
    assert (least <= oracles.loss(dense, start[0].numpy(), matrix[0].numpy()) + 1e-12).all()
    assert least.sum() < oracles.loss(dense, (round(weight[None]) * mask)[0].numpy(), matrix[0].numpy()).sum()
    for row, column in mask[0].nonzero().tolist():
        for level in range(-7, 8):
            other = found[0].clone()
            other[row, column] = level * step
            assert oracles.loss(dense, other.numpy(), matrix[0].numpy())[row] >= least[row] - 1e-9


@pytest.mark.parametrize("with_refit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_weights_are_on_the_grid_and_stay_there(method: str, dtype: torch.dtype, with_refit: bool) -> None:
    weight, x = torch.randn(8, 4, 3, 3).to(dtype), torch.randn(4, 4, 9, 8).cumsum(-1).to(dtype)
    layer = conv_layer("conv", weight.shape, False, padding=1)
    hessian = Hessian(layer, "cpu")
    hessian.add(x)
    rounding = sawb(weight, 0)
    found = solve(method, layer, weight, hessian, TWO_FOUR, False, with_refit, rounding)
    step = found.step
    assert step is not None and step.shape == rounding.step.shape
    again = ((found.weight.to(step.dtype) / step).round().clamp(-7, 7) * step).to(dtype)
    assert torch.equal(found.weight, again)
    assert (found.mask.sum(1) == 2).all() and not found.weight[~found.mask].any()


@pytest.mark.parametrize("dim", [None, 0])
def test_the_step_fits_the_weights_that_are_kept(dim: int | None) -> None:
    """No step among many leaves less error of rounding, counted by importance, than the fitted one by much."""
    kept, importance = torch.randn(1, 16, 64, dtype=torch.float64), torch.rand(1, 64, dtype=torch.float64)
    kept *= (kept.abs() > 0.6) * torch.rand(16, 1, dtype=torch.float64)
    given = sawb(kept[0], dim)
    fitted = given.fitted(kept, importance)

    def errors(steps: Tensor) -> Tensor:
        change = (kept / steps).round().clamp(-7, 7) * steps - kept
        weighted = (change.square() * importance)[0].sum(1)
        return weighted.sum() if dim is None else weighted

    assert fitted.step.shape == given.step.shape
    largest = kept.abs().amax() if dim is None else kept[0].abs().amax(1, keepdim=True)
    tried = torch.stack([errors(share * largest / 7) for share in torch.linspace(0.2, 1.2, 501).tolist()])
    assert (errors(fitted.step) <= 1.1 * tried.amin(0)).all()
    assert errors(fitted.step).sum() < errors(given.step).sum()


def test_rows_of_zeros_have_a_step() -> None:
    kept = torch.randn(1, 4, 8)
    kept[0, 2] = 0
    fitted = sawb(torch.randn(4, 8), 0).fitted(kept, torch.ones(1, 8))
    assert (fitted.step > 0).all() and fitted.step.isfinite().all()


def test_rounding_together_leaves_less_error_than_rounding_afterwards() -> None:
    weight, x = torch.randn(64, 128), correlated(1024, 128, torch.float32)
    hessian, rounding = hessian_of(x), sawb(weight)
    arguments = linear(64, 128), weight, hessian, TWO_FOUR, False

    def error(values: Tensor) -> float:
        return float((x @ (weight - values).T).norm() / (x @ weight.T).norm())

    together = solve("sparsegpt", *arguments, False, rounding)
    assert together.step is not None
    after = oracles.on_grid(solve("sparsegpt", *arguments).weight.double().numpy(), float(together.step), 7)
    refitted = solve("sparsegpt", *arguments, True, rounding)
    assert together.error == pytest.approx(error(together.weight), rel=1e-3)
    assert refitted.error < together.error < error(torch.from_numpy(after).float())


def test_the_error_of_weights_that_are_kept_is_that_on_the_grid() -> None:
    weight, x = torch.randn(16, 32), correlated(256, 32, torch.float32)
    rounding = sawb(weight)
    for method in ("magnitude", "wanda"):
        found = solve(method, linear(16, 32), weight, hessian_of(x), TWO_FOUR, False, False, rounding)
        assert torch.equal(found.weight, weight * found.mask)
        stored = oracles.on_grid(found.weight.numpy(), float(rounding.step), 7)
        expected = (x @ (weight - torch.from_numpy(stored)).T).norm() / (x @ weight.T).norm()
        assert found.error == pytest.approx(float(expected), rel=1e-3)


def test_refitting_on_a_grid_is_near_refitting_without() -> None:
    """With eight bits the grid is fine enough to reach the least squares of the same mask."""
    weight, x = torch.randn(16, 32, dtype=torch.float64), correlated(256, 32)
    hessian = hessian_of(x)
    grid = Grid(8, signed=True)
    rounding = Rounding(grid, weight.abs().max() * 2 / grid.high)
    assert set(METHODS) == {"magnitude", "wanda", "sparsegpt", "admm"}
    for method in METHODS:
        found = solve(method, linear(16, 32), weight, hessian, TWO_FOUR, False, True, rounding)
        best = refit(weight[None], found.mask[None], hessian.damped(), found.weight[None])
        least = float((x @ (weight - best[0]).T).norm() / (x @ weight.T).norm())
        assert least * (1 - 1e-6) <= found.error < 1.05 * least
