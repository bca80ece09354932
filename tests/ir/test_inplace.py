"""A layer's output is a tensor of its own, in every mode: operators may write to it in place, as after eager layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import nmcompile
from nmcompile import CompileConfig

SPARSE = CompileConfig(ends="sparse")
MODES = "dense", "weights", "training"


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens": (lambda: nn.Linear(8, 8), (2, 3, 8)),
    "tokens, no bias": (lambda: nn.Linear(8, 8, bias=False), (2, 3, 8)),
    "one sample": (lambda: nn.Linear(8, 8), (8,)),
    "no tokens": (lambda: nn.Linear(8, 8), (2, 0, 8)),
    "Hugging Face's Conv1D": (lambda: Conv1D(8, 8), (2, 3, 8)),
    "functional": (Functional, (2, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), (2, 8, 5)),
    "conv1d, one sample": (lambda: nn.Conv1d(8, 8, 3), (8, 5)),
    "conv1d, groups": (lambda: nn.Conv1d(8, 8, 3, groups=2), (2, 8, 5)),
    "conv1d, circular": (lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"), (2, 8, 5)),
    "conv2d, one sample": (lambda: nn.Conv2d(8, 8, 3), (8, 4, 4)),
    "conv2d, no samples": (lambda: nn.Conv2d(8, 8, 3), (0, 8, 4, 4)),
}


def _relu(h: Tensor) -> Tensor:
    return h.relu_()


def _add(h: Tensor) -> Tensor:
    h += 1
    return h


def _select(h: Tensor) -> Tensor:
    h[..., 0] = 0
    return h


def _where(h: Tensor) -> Tensor:
    h[h > 0.5] = 2.0
    return h


WRITES = _relu, _add, _select, _where


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_writes_to_an_output(name: str, mode: str) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    compiled = nmcompile.compile(nn.Sequential(layer), mode, config=SPARSE)
    assert not compiled(x)._is_view()
    for write in WRITES:
        whole = compiled(x)
        expected, written = write(whole.detach().clone()), write(compiled(x))
        assert torch.equal(written, expected)
        written.sum().backward()
        with torch.no_grad():
            assert torch.equal(write(compiled(x)), expected)
            assert not compiled(x)._is_view()
    with torch.autocast("cpu", torch.bfloat16):
        write = WRITES[0]
        assert torch.equal(write(compiled(x)), compiled(x).relu())


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_behind_a_write_are_those_of_eager(name: str, write: Callable[[Tensor], Tensor]) -> None:
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape)
    compiled = nmcompile.compile(nn.Sequential(layer), "dense")
    found, expected = (
        torch.autograd.grad(write(model(x)).square().sum(), list(layer.parameters())) for model in (compiled, layer)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
