"""The three GEMMs of a pruned layer against eager ones on masked operands, and in the mean over draws."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.training.find_masks import masks_of

SPARSE = CompileConfig(ends="sparse")
DRAWS = 400
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matrix": (lambda: nn.Linear(8, 4), (8, 8)),
    "tokens": (lambda: nn.Linear(8, 4), (2, 6, 8)),
    "conv": (lambda: nn.Conv2d(4, 8, 3, padding=1), (4, 4, 4, 3)),
    "stride": (lambda: nn.Conv2d(4, 8, 3, stride=2), (4, 4, 7, 7)),
    "dilation": (lambda: nn.Conv2d(4, 8, 2, dilation=2), (4, 4, 5, 4)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=2), (4, 8, 4, 4)),
    "pointwise": (lambda: nn.Conv2d(8, 4, 1, bias=False), (4, 8, 3, 3)),
    "odd batch": (lambda: nn.Conv2d(4, 8, 2), (3, 4, 4, 4)),
    "1d": (lambda: nn.Conv1d(4, 8, 3), (4, 4, 6)),
}


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Return a layer compiled for training, the same layer with its weight masked, an input and an output gradient."""
    torch.manual_seed(0)
    layer, shape = LAYERS[name][0]().double(), LAYERS[name][1]
    compiled = nmcompile.compile(layer, "training", config=SPARSE)
    x = torch.randn(shape, dtype=torch.float64)
    grad_output = torch.randn(compiled(x).shape, dtype=torch.float64)
    masked = LAYERS[name][0]().double()
    masked.load_state_dict(layer.state_dict())
    (mask,) = masks_of(compiled).values()
    masked.weight.data *= mask.tensor  # type: ignore[operator]
    return compiled, masked, x, grad_output


def gradients(layer: nn.Module, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], grad_output)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_input_and_bias_gradients_are_those_of_the_masked_layer(name: str) -> None:
    compiled, masked, x, grad_output = made(name)
    torch.testing.assert_close(compiled(x), masked(x))
    grad_input, _, *grad_bias = gradients(compiled, x, grad_output)
    expected_input, _, *expected_bias = gradients(masked, x, grad_output)
    torch.testing.assert_close(grad_input, expected_input)
    torch.testing.assert_close(grad_bias, expected_bias)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_gradients_are_dense_and_unbiased(name: str) -> None:
    """The mean over draws is within 5 sigma of the dense gradient, also where the mask has zeros."""
    compiled, masked, x, grad_output = made(name)
    draws = torch.stack([gradients(compiled, x, grad_output)[1] for _ in range(DRAWS)])
    expected = gradients(masked, x, grad_output)[1]
    sigma = draws.std(0) / DRAWS**0.5
    assert (draws[0] != draws[1]).any()
    assert ((draws.mean(0) - expected).abs() <= 5 * sigma + 1e-12).all()


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_with_nothing_pruned(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name][0]().double(), LAYERS[name][1]
    dense = nmcompile.compile(layer, "dense")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*dense.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(dense, dict(zip(names, values, strict=True)), (x,))
        return output

    assert torch.autograd.gradcheck(run, (x, *parameters))
