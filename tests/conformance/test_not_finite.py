"""NaN and infinity come out of sparse kernels where they come out of dense ones, whichever kernel is chosen."""

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice

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


def test_a_sum_that_overflows_only_costs_the_sparse_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(16, 16), torch.full((8, 16), 3e38)
    x[:, 1::2] = -3e38
    x[0] = 3e38  # their sum is infinite
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    found = run(layer, "cpu", x, torch.ones(8, 16))
    expected = run(layer, "reference", x, torch.ones(8, 16))
    assert all(torch.equal(ours, dense) for ours, dense in zip(found[:1], expected[:1], strict=True))
