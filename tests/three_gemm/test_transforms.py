"""Pruned layers under torch.func and forward-mode AD, compared with the plain model that holds the pruned weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import nmcompile
from nmcompile import CompileConfig
from nmcompile.errors import GradientError

SPARSE = CompileConfig(ends="sparse")
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build() -> nn.Module:
    layers = nn.Linear(8, 8), nn.Tanh(), nn.Unflatten(-1, (8, 1)), nn.Conv1d(8, 4, 1), nn.Flatten(-2), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(4, 4)).double()


def pair(mode: str) -> tuple[nn.Module, nn.Module]:
    """Return a compiled model, and the plain one with the same pruned weights."""
    compiled = nmcompile.compile(build(), mode, config=SPARSE)
    compiled(X)
    return compiled, nmcompile.finalize(compiled)


def loss(model: nn.Module) -> Callable[..., Tensor]:
    def value(parameters: Any, x: Tensor) -> Tensor:
        y: Tensor = functional_call(model, parameters, (x,))
        return y.square().sum()

    return value


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def dual(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        tangent: Tensor = forward_ad.unpack_dual(model(forward_ad.make_dual(X, X.cos()))).tangent
        return tangent


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: grad(loss(model))(parameters(model), X),
    "grad of the input": lambda model: grad(loss(model), 1)(parameters(model), X),
    "vmap": lambda model: vmap(model)(X),
    "gradients of samples": lambda model: vmap(grad(loss(model)), (None, 0))(parameters(model), X.unsqueeze(1)),
    "jacrev": lambda model: jacrev(model)(X),
    "jacfwd": lambda model: jacfwd(model)(X),
    "jvp": lambda model: jvp(model, (X,), (X.cos(),)),
    "forward-mode AD": dual,
}


@pytest.mark.parametrize("mode", ["dense", "weights", "t-weights"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_equals_the_plain_model(transform: Callable[[nn.Module], Any], mode: str) -> None:
    compiled, plain = pair(mode)
    torch.testing.assert_close(transform(compiled), transform(plain), rtol=1e-12, atol=1e-12)


def test_tangents_of_weights_pass_straight_through() -> None:
    layer = nn.Linear(8, 8).double()
    compiled = nmcompile.compile(nn.Sequential(layer), "weights", config=SPARSE)
    tangent = torch.randn(8, 8, dtype=torch.float64)
    found: Tensor = jvp(
        lambda w: functional_call(compiled, {"0.weight": w}, (X,)), (layer.weight.detach(),), (tangent,)
    )[1]
    torch.testing.assert_close(found, X @ tangent.t())


def test_draws_of_gradients_need_leave_to_differ() -> None:
    compiled, plain = pair("gradients")
    samples = X.expand(4, 4, 8)  # the same four tokens each
    with pytest.raises(GradientError, match="randomness='different'"):
        vmap(grad(loss(compiled)), (None, 0))(parameters(compiled), samples)
    gradients = vmap(grad(loss(compiled)), (None, 0), randomness="different")(parameters(compiled), samples)
    exact = vmap(grad(loss(plain)), (None, 0))(parameters(plain), samples)
    torch.testing.assert_close(gradients["0.bias"], exact["0.bias"])  # from the gradient that is not pruned
    found = gradients["0.weight"]
    assert not torch.allclose(found, exact["0.weight"])
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(jacrev(compiled)(X), jacrev(plain)(X))  # jacrev prunes no gradient


def penalty(model: nn.Module) -> Tensor:
    """Return the gradient of a gradient penalty, as in WGAN-GP."""
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_second_derivatives_of_dense_layers() -> None:
    compiled, plain = pair("dense")
    assert torch.equal(penalty(compiled), penalty(plain))
    torch.testing.assert_close(
        hessian(loss(compiled), 1)(parameters(compiled), X), hessian(loss(plain), 1)(parameters(plain), X)
    )


@pytest.mark.parametrize("mode", ["weights", "training"])
def test_second_derivatives_of_pruned_layers_are_refused(mode: str) -> None:
    compiled, _ = pair(mode)
    with pytest.raises(GradientError, match=r"second derivative .* pruned GEMM has none"):
        penalty(compiled)
    with pytest.raises(GradientError, match=r"layer '\d': a second derivative"):
        grad(lambda y: grad(lambda z: compiled(z).square().sum())(y).square().sum())(X)


def test_forward_mode_of_pruned_inputs_is_refused() -> None:
    layers = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
    compiled = nmcompile.compile(nn.Sequential(*layers).double(), "activations", args=(X,), config=SPARSE)
    with pytest.raises(GradientError, match=r"layer '2': forward-mode .* use reverse mode"):
        jvp(compiled, (X,), (X,))
    found = grad(lambda x: compiled(x).square().sum())(X)
    x = X.clone().requires_grad_()
    compiled(x).square().sum().backward()
    assert x.grad is not None and torch.equal(found, x.grad)
