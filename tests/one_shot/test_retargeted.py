"""Weights for pruned inputs: least squares against the outputs for the dense ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.ir.layers import conv_layer
from nmcompile.one_shot.hessian import Hessian
from nmcompile.one_shot.matrices import as_matrices, from_matrices
from nmcompile.one_shot.solve import solve
from nmcompile.pruning import mask
from nmcompile.pruning.pattern import NMPattern
from tests.one_shot.correlated import correlated, linear

TWO_FOUR = NMPattern(2, 4)


def pruned(x: Tensor, dim: int = -1) -> Tensor:
    return x * mask(x, NMPattern(4, 8), dim)


def hessian_of(x: Tensor, dense: Tensor) -> Hessian:
    hessian = Hessian(linear(1, x.shape[-1]), "cpu")
    for batch in zip(x.split(100), dense.split(100), strict=True):
        hessian.add(*batch)
    return hessian


def test_they_are_the_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.one_shot.hessian.DAMPING", 1e-12)
    dense, weight = correlated(400, 16).relu(), torch.randn(1, 8, 16, dtype=torch.float64)
    x = pruned(dense)
    found = hessian_of(x, dense).retargeted(weight)[0].numpy()
    best = np.linalg.lstsq(x.numpy(), (dense @ weight[0].T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found, best, rtol=1e-6, atol=1e-8)


def test_inputs_that_are_not_pruned_leave_the_weights() -> None:
    x, weight = correlated(50, 8), torch.randn(1, 4, 8, dtype=torch.float64)
    hessian = Hessian(linear(4, 8), "cpu")
    hessian.add(x)
    assert hessian.retargeted(weight) is weight
    torch.testing.assert_close(hessian_of(x, x).retargeted(weight), weight, rtol=0, atol=0)


def test_groups_of_a_convolution_are_retargeted_alone() -> None:
    weight = torch.randn(8, 8, 3, dtype=torch.float64)
    layer = conv_layer("conv", weight.shape, False, groups=2, padding=1)
    dense = torch.randn(4, 16, 12, dtype=torch.float64).cumsum(-1).relu()
    x = pruned(dense, 1)
    hessian = Hessian(layer, "cpu")
    hessian.add(x, dense)
    found = from_matrices(layer, hessian.retargeted(as_matrices(layer, weight)))
    expected = F.conv1d(dense, weight, None, 1, 1, 1, 2)

    def distance(values: Tensor) -> float:
        return float((F.conv1d(x, values, None, 1, 1, 1, 2) - expected).norm())

    assert distance(found) < 0.9 * distance(weight)
    half = conv_layer("half", (4, 8, 3), False, padding=1)
    alone = Hessian(half, "cpu")
    alone.add(x[:, :8], dense[:, :8])
    torch.testing.assert_close(from_matrices(half, alone.retargeted(as_matrices(half, weight[:4]))), found[:4])


@pytest.mark.parametrize(("method", "refit"), [("sparsegpt", False), ("admm", False), ("magnitude", True)])
def test_methods_that_change_weights_aim_at_the_dense_outputs(method: str, refit: bool) -> None:
    dense, weight = correlated(600, 32).relu(), torch.randn(16, 32, dtype=torch.float64)
    x, layer = pruned(dense), linear(16, 32)
    blind = Hessian(layer, "cpu")
    blind.add(x)

    def distance(hessian: Hessian) -> float:
        found = solve(method, layer, weight, hessian, TWO_FOUR, False, refit)
        return float((x @ found.weight.T - dense @ weight.T).norm())

    assert distance(hessian_of(x, dense)) < 0.98 * distance(blind)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_methods_that_keep_weights_keep_them(method: str) -> None:
    dense, weight = correlated(100, 16).relu(), torch.randn(8, 16, dtype=torch.float64)
    found = solve(method, linear(8, 16), weight, hessian_of(pruned(dense), dense), TWO_FOUR, False)
    assert torch.equal(found.weight, weight * found.mask)
