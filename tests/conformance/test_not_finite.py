"""NaN and infinity come out of sparse kernels where they come out of dense ones, whichever kernel is chosen."""

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu.gemm import Geometry, sparse_forward, sparse_update
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.packed_weights import Packs
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice
from nmcompile.pruning import OPERATORS, NMPattern

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)
LAYERS = {
    "linear": (lambda: nn.Linear(16, 16), (8, 16)),
    "tokens": (lambda: nn.Linear(16, 16), (2, 4, 16)),
    "conv": (lambda: nn.Conv2d(16, 16, 3, padding=1), (4, 16, 5, 5)),
}


def run(layer: nn.Module, backend: str, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Return the output and the gradients of input and weight."""
    compiled = nmcompile.compile(nn.Sequential(layer), "training", backend=backend, config=CompileConfig(ends="sparse"))
    x = x.clone().requires_grad_()
    output = compiled(x)
    output.backward(grad_output)
    weight = next(layer.parameters())
    found = [output.detach(), x.grad, weight.grad]
    weight.grad = None
    return [tensor.float() for tensor in found if tensor is not None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["input", "gradient", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_as_in_the_dense_product(
    name: str, dtype: torch.dtype, place: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = LAYERS[name]
    layer, x = build().to(dtype), torch.randn(shape, dtype=dtype)
    grad_output = torch.randn_like(layer(x)).detach()
    target = {"input": x, "gradient": grad_output, "weight": next(layer.parameters()).data}[place]
    target.view(-1)[target.numel() // 3] = value
    expected = run(layer, "reference", x, grad_output)
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    found = run(layer, "cpu", x, grad_output)
    assert any(not tensor.isfinite().all() for tensor in expected)
    for ours, dense in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), dense.isnan())
        assert torch.equal(ours.isposinf(), dense.isposinf())
        assert torch.equal(ours.isneginf(), dense.isneginf())
        torch.testing.assert_close(ours[ours.isfinite()], dense[dense.isfinite()], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [(0, 0), (299, 131), (150, 64), (16, 130)])
def test_kernels_find_it_wherever_it_is(place: tuple[int, int], dtype: torch.dtype, value: float) -> None:
    x, weight = torch.randn(300, 132, dtype=dtype), torch.randn(72, 132, dtype=dtype)
    weight = OPERATORS["greedy"].prune(weight, NMPattern(2, 4), 1, None)
    grad_output = OPERATORS["greedy"].prune(torch.randn(300, 72, dtype=dtype), NMPattern(2, 4), 0, None)
    packs: Packs = []
    y = x.new_empty(300, 72)
    assert sparse_forward(x, weight, None, None, y, Geometry(), packs)
    x[place] = value
    assert not sparse_forward(x, weight, None, None, y, Geometry())
    assert not sparse_forward(x, weight, None, None, y, Geometry(), packs)
    assert not sparse_update(grad_output, x, torch.empty_like(weight), Geometry(), "flat", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_weights_that_the_mask_keeps_have_to_be_finite(dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 132, dtype=dtype), torch.randn(72, 132, dtype=dtype)
    mask = torch.tensor([True, False, False, True]).expand(72, 33, 4).reshape(72, 132)
    y = x.new_empty(300, 72)
    weight[71, 129] = torch.nan
    assert sparse_forward(x, weight, mask, None, y, Geometry()) and y.isfinite().all()
    weight[71, 131] = torch.nan
    assert not sparse_forward(x, weight, mask, None, y, Geometry())


def test_large_values_are_finite_though_their_sum_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(16, 16), torch.full((8, 16), 3e38)
    x[:, 1::2] = -3e38
    x[0] = 3e38  # their sum is infinite
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    found = run(layer, "cpu", x, torch.ones(8, 16))
    expected = run(layer, "reference", x, torch.ones(8, 16))
    assert all(torch.equal(ours, dense) for ours, dense in zip(found[:1], expected[:1], strict=True))
