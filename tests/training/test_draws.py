"""The random stream: micro-batches and layers draw separately, runs repeat, and global generators are only read."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmcompile
from nmcompile import CompileConfig

SPARSE = CompileConfig(ends="sparse")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def compiled(mode: str = "training", seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), mode, config=SPARSE)
    assert isinstance(model, nn.Sequential)
    return model


def weight_gradient(model: nn.Module, x: Tensor) -> Tensor:
    first = next(model.parameters())
    (gradient,) = torch.autograd.grad(model(x).square().sum(), [first])
    return gradient


def test_micro_batches_draw_independently_and_accumulate() -> None:
    model = compiled()
    first, second = weight_gradient(model, X), weight_gradient(model, X)
    assert not torch.equal(first, second)
    again = compiled()
    for _ in range(2):
        again(X).square().sum().backward()
    accumulated = next(again.parameters()).grad
    assert accumulated is not None and torch.equal(accumulated, first + second)


def test_a_shared_layer_draws_for_each_call() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(8, 8, bias=False)
    shared = nmcompile.compile(nn.Sequential(layer), "gradients", config=SPARSE)
    grad_outputs = torch.randn(2, 16, 8)
    together = torch.autograd.grad((shared(X), shared(X)), [layer.weight], tuple(grad_outputs))[0]
    torch.manual_seed(1)
    nn.Linear(8, 8)
    alone = nmcompile.compile(nn.Sequential(layer), "gradients", config=SPARSE)
    parts = [torch.autograd.grad(alone(X), [layer.weight], grad)[0] for grad in grad_outputs.flip(0)]
    torch.testing.assert_close(together, parts[0] + parts[1])
    same_twice = torch.autograd.grad((alone(X), alone(X)), [layer.weight], (grad_outputs[0], grad_outputs[0]))[0]
    assert not torch.equal(same_twice, 2 * torch.autograd.grad(alone(X), [layer.weight], grad_outputs[0])[0])


def test_layers_draw_independently() -> None:
    torch.manual_seed(1)
    model = nmcompile.compile(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), "gradients", config=SPARSE)
    grad_output = torch.randn(16, 8)
    first, second = (torch.autograd.grad(layer(X), [layer.weight], grad_output)[0] for layer in model)  # type: ignore[attr-defined]
    assert not torch.equal(first, second)


def test_runs_repeat_from_the_seed() -> None:
    one, two, other = compiled(), compiled(), compiled(seed=2)
    other.load_state_dict(one.state_dict())
    expected = [weight_gradient(one, X) for _ in range(3)]
    assert all(torch.equal(weight_gradient(two, X), gradient) for gradient in expected)
    assert not any(torch.equal(weight_gradient(other, X), gradient) for gradient in expected)


def test_global_generators_are_only_read() -> None:
    model = compiled()
    before = torch.get_rng_state()
    weight_gradient(model, X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["dense", "training"])
def test_checkpointed_gradients_are_the_same(mode: str, reentrant: bool) -> None:
    plain, saving = compiled(mode), compiled(mode)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    plain(x).square().sum().backward()
    output = checkpoint(saving, y, use_reentrant=reentrant)
    assert isinstance(output, Tensor)
    output.square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad) for a, b in pairs)
