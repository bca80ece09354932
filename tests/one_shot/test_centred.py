"""Biases take up the mean error of a layer, and weights are found for the deviations from the mean."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.ir.layers import conv_layer
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.rounding import Rounding
from nmcompile.one_shot.solve import Solution, solve
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid
from tests.one_shot.correlated import correlated, linear

TWO_FOUR = NMPattern(2, 4)


def inputs(tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Draw inputs of a dense model, with means other than zero, and those that a pruned model gives in their place."""
    dense = (correlated(tokens, columns) + torch.randn(columns, dtype=torch.float64)).relu()
    return dense, dense + 0.3 * torch.randn_like(dense).abs()


def centred(x: Tensor, dense: Tensor) -> Hessian:
    hessian = Hessian(linear(1, x.shape[-1]), "cpu", is_centred=True)
    for batch in zip(x.split(100), dense.split(100), strict=True):
        hessian.add(*batch)
    return hessian


def solved(method: str, weight: Tensor, hessian: Hessian, refit: bool = False) -> tuple[Solution, Tensor]:
    found = solve(method, linear(*weight.shape), weight, hessian, TWO_FOUR, False, refit)
    assert found.bias is not None
    return found, found.bias


def test_weights_and_bias_are_the_least_squares_with_an_intercept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.one_shot.hessian.DAMPING", 1e-12)
    dense, x = inputs(400, 16)
    weight = torch.randn(1, 8, 16, dtype=torch.float64)
    hessian = centred(x, dense)
    found = hessian.retargeted(weight)
    ones = np.ones((len(x), 1))
    best = np.linalg.lstsq(np.hstack([x.numpy(), ones]), (dense @ weight[0].T).numpy(), rcond=None)[0]
    np.testing.assert_allclose(found[0].numpy().T, best[:-1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(hessian.mean_error(weight, found)[0].numpy(), best[-1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_refitted_weights_and_bias_are_the_least_squares_on_the_mask(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmcompile.one_shot.hessian.DAMPING", 1e-9)
    monkeypatch.setattr("nmcompile.one_shot.refit.TOLERANCE", 1e-10)
    dense, x = inputs(400, 16)
    weight = torch.randn(8, 16, dtype=torch.float64)
    found, bias = solved(method, weight, centred(x, dense), refit=True)
    for row in range(8):
        seen = np.hstack([x.numpy()[:, found.mask[row].numpy()], np.ones((len(x), 1))])
        best = np.linalg.lstsq(seen, (dense @ weight[row]).numpy(), rcond=None)[0]
        np.testing.assert_allclose(found.weight[row][found.mask[row]].numpy(), best[:-1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(float(bias[row]), best[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_the_mean_error_is_gone(method: str, is_rounded: bool) -> None:
    dense, x = inputs(300, 16)
    weight = torch.randn(8, 16, dtype=torch.float64)
    rounding = Rounding(Grid(4, signed=True), torch.tensor(0.3, dtype=torch.float64)) if is_rounded else None
    found = solve(method, linear(8, 16), weight, centred(x, dense), TWO_FOUR, False, False, rounding)
    assert found.bias is not None
    before = x @ found.weight.T - dense @ weight.T
    torch.testing.assert_close((before + found.bias).mean(0), torch.zeros(8).double(), rtol=0, atol=1e-9)
    assert before.mean(0).abs().min() > 1e-3
    relative = (before + found.bias).norm() / (dense @ weight.T).norm()
    assert found.error < relative  # which also holds what no weights for these inputs could give


def test_a_free_bias_leaves_less_error() -> None:
    dense, x = (one + 2 for one in inputs(600, 32))  # with fixed biases, weights have to hold the large mean
    weight = torch.randn(16, 32, dtype=torch.float64)
    fixed = Hessian(linear(16, 32), "cpu")
    fixed.add(x, dense)
    stays = solve("sparsegpt", linear(16, 32), weight, fixed, TWO_FOUR, False)
    found, bias = solved("sparsegpt", weight, centred(x, dense))
    assert stays.bias is None
    expected = dense @ weight.T
    assert (x @ found.weight.T + bias - expected).norm() < 0.9 * (x @ stays.weight.T - expected).norm()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_methods_that_keep_weights_keep_the_bias(method: str) -> None:
    dense, x = inputs(100, 16)
    weight = torch.randn(8, 16, dtype=torch.float64)
    found = solve(method, linear(8, 16), weight, centred(x, dense), TWO_FOUR, False)
    assert found.bias is None
    plain = Hessian(linear(8, 16), "cpu")
    plain.add(x)
    other = solve(method, linear(8, 16), weight, plain, TWO_FOUR, False)
    assert torch.equal(found.mask, other.mask) and found.error == pytest.approx(other.error)


def test_each_group_of_a_convolution_has_means_of_its_own() -> None:
    weight = torch.randn(8, 8, 3, dtype=torch.float64)
    layer = conv_layer("conv", weight.shape, True, groups=2, padding=1)
    dense = torch.randn(4, 16, 12, dtype=torch.float64).cumsum(-1).relu()
    x = dense * 0.8 + 0.1
    hessian = Hessian(layer, "cpu", is_centred=True)
    hessian.add(x, dense)
    found = solve("sparsegpt", layer, weight, hessian, TWO_FOUR, False)
    assert found.bias is not None and found.bias.shape == (8,)
    error = F.conv1d(x, found.weight, found.bias, 1, 1, 1, 2) - F.conv1d(dense, weight, None, 1, 1, 1, 2)
    torch.testing.assert_close(error.mean((0, 2)), torch.zeros(8).double(), rtol=0, atol=1e-9)


def test_constant_inputs_are_left_to_the_bias() -> None:
    x = torch.ones(50, 8, dtype=torch.float64) * torch.arange(1.0, 9.0)
    weight = torch.randn(4, 8, dtype=torch.float64)
    found, bias = solved("sparsegpt", weight, centred(x, x))
    torch.testing.assert_close(x @ found.weight.T + bias, x @ weight.T)
