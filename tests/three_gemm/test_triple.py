"""The autograd function around the three graphs, for a layer that is called more than once before backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import ConfigError

SPARSE = CompileConfig(ends="sparse")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def twice_in_a_row(model: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(model(torch.tanh(model(x))))


def on_two_inputs(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x) * model(x.square())
    return y


def sparse_weight(layer: nn.Module) -> Tensor:
    plain = nmcompile.finalize(layer)
    assert isinstance(plain, nn.Linear)
    return plain.weight.detach()


@pytest.mark.parametrize("mode", ["weights", "t-weights"])
@pytest.mark.parametrize("use", [twice_in_a_row, on_two_inputs])
def test_a_layer_that_is_called_twice(use: Callable[[nn.Module, Tensor], Tensor], mode: str) -> None:
    torch.manual_seed(0)
    compiled = nmcompile.compile(nn.Linear(8, 8), mode, config=SPARSE)
    eager = nn.Linear(8, 8)
    eager.load_state_dict(compiled.state_dict())
    got, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    loss = use(compiled, got).square().sum()
    eager.weight.data = sparse_weight(compiled)
    use(eager, expected).square().sum().backward()
    loss.backward()
    assert got.grad is not None and expected.grad is not None
    assert torch.equal(got.grad, expected.grad)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))  # type: ignore[arg-type]


def test_a_weight_that_changed_between_forward_and_backward_is_an_error() -> None:
    compiled = nmcompile.compile(nn.Linear(8, 8), "training", config=SPARSE)
    loss = compiled(X.clone().requires_grad_()).sum()
    with torch.no_grad():
        next(compiled.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_only_the_gradients_that_are_wanted_are_computed(frozen: str) -> None:
    layer = nn.Linear(8, 8)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name != frozen)
    compiled, x = nmcompile.compile(layer, "dense"), X.clone().requires_grad_(frozen != "input")
    leaves = {name: leaf for name, leaf in (("input", x), *layer.named_parameters()) if leaf.requires_grad}
    got = torch.autograd.grad(compiled(x).square().sum(), list(leaves.values()))
    eager = torch.autograd.grad(layer(x).square().sum(), list(leaves.values()))
    assert len(leaves) == 2 and all(torch.equal(*pair) for pair in zip(got, eager, strict=True))


def test_data_parallel_is_refused() -> None:
    """`nn.DataParallel` calls such replicas on several devices."""
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 8)), config=CompileConfig(ends="sparse"))
    with pytest.raises(ConfigError, match=r"layer '0': nn\.DataParallel"):
        model.get_submodule("0")._replicate_for_data_parallel()
