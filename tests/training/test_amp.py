"""Autocast and GradScaler."""

import copy

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )


X = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_mode_under_autocast_is_eager_under_autocast(dtype: torch.dtype) -> None:
    eager = results(network(), dtype)
    ours = results(nmcompile.compile(network(), "dense"), dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast_prunes_what_the_masters_say(dtype: torch.dtype) -> None:
    model = nmcompile.compile(network(), "training", config=CompileConfig(ends="sparse"))
    report = nmcompile.verify(model, step=lambda: results(model, dtype))
    assert report.ok and len(report.checks) > len(list(model.parameters()))
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mode", ["dense", "training"])
def test_backward_inside_autocast_has_the_precision_of_its_forward(mode: str) -> None:
    """In backward, autocast does not decide about the operands, which forward has cast or not."""
    gradients = []
    for inside in (False, True):
        model = nmcompile.compile(network(), mode, config=CompileConfig(ends="sparse"))
        loss = model(X).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_overflow_reaches_the_scaler(bad: float, sparse: bool) -> None:
    """MVUE keeps a block with an infinity non-finite, so the step is skipped as for the dense model."""
    model = nmcompile.compile(network(), "training", config=CompileConfig(ends="sparse")) if sparse else network()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    y = model(X)
    y.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), bad))
    scaler.scale(y.square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 8.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
