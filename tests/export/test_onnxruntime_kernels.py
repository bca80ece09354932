"""Execution of files in ONNX Runtime: integer kernels where numbers allow it, the same numbers everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nmcompile.export import write_onnx
from tests.optimized_graphs import optimized

Deploy = Callable[..., Any]


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def unsigned(model: Any) -> Any:
    """Return the model with unsigned inputs that are not pruned, as after a ReLU with an odd number of channels."""
    for layer in model.layers.values():
        object.__setattr__(layer.input, "pattern", None)
    return model


@pytest.mark.parametrize(
    ("layers", "shape", "kernel"),
    [
        ([nn.Conv2d(8, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False)], (2, 8, 9, 9), "QLinearConv"),
        ([nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8)], (2, 5, 8), "MatMulIntegerToFloat"),
        ([nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)], (2, 8), "QGemm"),
    ],
)
def test_quantized_layers_run_as_integers(
    deploy: Deploy, tmp_path: Path, layers: list[nn.Module], shape: tuple[int, ...], kernel: str
) -> None:
    model = unsigned(deploy(nn.Sequential(*layers), prune_inputs=True))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,)).path
    assert optimized(path)[kernel] >= 1
    torch.testing.assert_close(run(path, x), model.reference(x).detach(), rtol=1e-4, atol=1e-5)


def biased_chain(deploy: Deploy, bias: Callable[[Tensor], Tensor]) -> Any:
    """Return two convs in a row; the bias of the first is made from the step of its accumulator."""
    torch.manual_seed(0)
    model = unsigned(deploy(nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)), prune_inputs=True))
    first = model.layers["0"]
    step = first.weight.scale * first.input.scale
    for module in (model.plain[0], model.reference[0]):
        module.bias.data.copy_(bias(step))
    return model


@pytest.mark.parametrize(("fraction", "fused"), [(0.0, 1), (0.4, 0)])
def test_bias_between_two_steps_is_not_rounded(deploy: Deploy, tmp_path: Path, fraction: float, fused: int) -> None:
    model = biased_chain(deploy, lambda step: (torch.arange(16) + fraction) * step)
    x = torch.rand(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,)).path
    assert optimized(path)["QLinearConv"] == fused
    torch.testing.assert_close(run(path, x), model.reference(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(2)])
def test_bias_is_not_rounded_whatever_lies_between(deploy: Deploy, tmp_path: Path, between: nn.Module) -> None:
    torch.manual_seed(0)
    last = nn.Linear(16, 8) if isinstance(between, nn.Flatten) else nn.Conv2d(16, 8, 1)
    model = unsigned(deploy(nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), between, last), prune_inputs=True))
    x = torch.rand(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,), dynamic_batch=False).path
    torch.testing.assert_close(run(path, x), model.reference(x).detach(), rtol=1e-4, atol=1e-5)


def test_inputs_of_weight_only_layers_are_not_rounded(deploy: Deploy, tmp_path: Path) -> None:
    model, x = deploy(nn.Linear(64, 32), input_bits=None), torch.randn(2, 5, 64)
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,)).path
    torch.testing.assert_close(run(path, x), model.reference(x).detach(), rtol=1e-5, atol=1e-5)


class Tapped(nn.Module):
    """A layer whose result is quantized and also is an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return y, self.second(y)


@pytest.mark.parametrize("weight_bits", [4, None])
def test_outputs_that_are_quantized_elsewhere_stay_whole(
    deploy: Deploy, tmp_path: Path, weight_bits: int | None
) -> None:
    """The bias, or the node that keeps the weight from being rounded, also comes before the output."""
    model, x = deploy(Tapped(), weight_bits=weight_bits), torch.randn(2, 8, 4, 4)
    path = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (x,)).path
    assert [output.name for output in onnx.load(path).graph.output] == ["conv2d", "conv2d_1"]
    torch.testing.assert_close(run(path, x), model.reference(x)[0].detach(), rtol=1e-4, atol=1e-5)
