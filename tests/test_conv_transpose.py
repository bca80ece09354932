"""Transposed convolutions: all three GEMMs against float64, the output size of a call, masks from data, and files."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase

ALL = CompileConfig(ends="sparse")
CLASSES: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
GEOMETRIES: dict[str, dict[str, int]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 4, "stride": 2, "padding": 1},
    "output padding": {"kernel_size": 3, "stride": 3, "padding": 1, "output_padding": 2},
    "dilated": {"kernel_size": 3, "stride": 2, "dilation": 2},
}


def layer_of(dims: int, **geometry: Any) -> nn.Module:
    result: nn.Module = CLASSES[dims](8, 12, **geometry)
    return result


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 3, 2, 1, output_padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 2, 2),
    )  # fmt: skip


def masked(compiled: nn.Module, dense: nn.Module) -> nn.Module:
    """Return the dense model in float64, its weights multiplied by the masks of the compiled one."""
    masks = nmcompile.sparse_state_dict(compiled)
    for name, parameter in dense.double().named_parameters():
        if f"{name}.mask" in masks:
            parameter.data *= masks[f"{name}.mask"]
    return dense


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dims", CLASSES)
def test_three_gemms_are_those_of_the_masked_weight(dims: int, geometry: str) -> None:
    layer = layer_of(dims, **GEOMETRIES[geometry])
    oracle = layer_of(dims, **GEOMETRIES[geometry])
    oracle.load_state_dict(layer.state_dict())
    x = torch.randn(4, 8, *(5, 4, 3)[:dims], requires_grad=True)
    compiled = nmcompile.compile(layer, "t-weights", config=ALL)
    y = compiled(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    wide = x.detach().double().requires_grad_()
    expected = masked(compiled, oracle)(wide)
    expected.backward(gradient.double())
    assert isinstance(x.grad, Tensor) and isinstance(wide.grad, Tensor)
    torch.testing.assert_close(y, expected.float())
    torch.testing.assert_close(x.grad, wide.grad.float(), rtol=1e-5, atol=1e-5)
    for name, parameter in oracle.named_parameters():
        found, wanted = compiled.get_parameter(name).grad, parameter.grad
        assert found is not None and wanted is not None
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-4)  # straight through to the dense weight
    assert float((oracle.get_parameter("weight") == 0).double().mean()) == 0.5
    assert nmcompile.verify(compiled).ok


@pytest.mark.parametrize("dims", CLASSES)
def test_dense_mode_is_eager_bit_for_bit(dims: int) -> None:
    layer, x = layer_of(dims, kernel_size=4, stride=2, padding=1), torch.randn(3, 8, *(5, 4, 3)[:dims])
    x.requires_grad_()
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    compiled = nmcompile.compile(layer, "dense")
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *compiled.parameters()])
    assert torch.equal(compiled(x), y) and all(map(torch.equal, found, expected))


def test_the_pruned_gradient_is_unbiased_in_the_update() -> None:
    layer, x = layer_of(2, kernel_size=3, stride=2), torch.randn(4, 8, 3, 3)
    gradient = torch.randn_like(layer(x))
    layer(x).backward(gradient)
    weight = layer.get_parameter("weight")
    assert weight.grad is not None
    dense = weight.grad.clone()
    compiled = nmcompile.compile(layer, "gradients", config=ALL)
    draws = []
    for _ in range(400):
        compiled.zero_grad()
        compiled(x).backward(gradient)
        assert weight.grad is not None
        draws.append(weight.grad.clone())
    samples = torch.stack(draws).double()
    error = (samples.mean(0) - dense) / (samples.std(0) / len(draws) ** 0.5)
    assert float(error.abs().max()) < 5 and 0.8 < float(error.square().mean()) < 1.2


@pytest.mark.parametrize("mode", ["dense", "t-weights"])
def test_a_call_may_ask_for_its_output_size(mode: str) -> None:
    layer, x = nn.ConvTranspose2d(8, 8, 3, stride=3, dilation=(1, 5)), torch.randn(2, 8, 4, 4)
    compiled = nmcompile.compile(layer, mode, config=ALL)
    plain = nmcompile.finalize(compiled)
    for size in [(12, 20), (13, 22), (14, 21), (12, 22)]:
        found = compiled(x, output_size=size)
        torch.testing.assert_close(found, plain(x, output_size=size))
        assert found.shape[2:] == size
    with pytest.raises(ValueError, match="requested an output size"):
        compiled(x, output_size=(40, 40))


class Functional(nn.Module):
    """A transposed convolution by its function."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 12, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernel, None, 2, padding=1)


def test_a_functional_call_is_a_layer_too() -> None:
    model, x = Functional(), torch.randn(2, 8, 5, 5)
    compiled = nmcompile.compile(model, "training", args=(x,), config=ALL)
    compiled(x).sum().backward()
    [layer] = nmcompile.inspect(compiled).layers
    assert layer.layer.kind == "conv_transpose2d" and [layer.density(phase) for phase in Phase] == [0.5] * 3
    assert torch.equal(nmcompile.finalize(compiled)(x), compiled(x)) and nmcompile.verify(compiled).ok


@pytest.mark.parametrize("groups", [2, 8])
def test_groups_stay_dense_with_a_reason(groups: int) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 8, 3, groups=groups), nn.Conv1d(8, 8, 1))
    report = nmcompile.analyze(model)
    kind = "depthwise" if groups == 8 else "grouped"
    assert report.program.captured.skipped == {"1": f"{kind} transposed convolution"}


def test_masks_from_data_leave_it_to_magnitude() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.Conv1d(8, 8, 1))
    x = torch.randn(4, 8, 6)
    by_data = nmcompile.compile(model, "weights", config=CompileConfig(ends="sparse", masks="wanda"), calibration=[x])
    magnitude = nmcompile.compile(model, "weights", config=ALL)
    assert by_data(x).shape == magnitude(x).shape
    masks = [nmcompile.sparse_state_dict(one)["1.weight.mask"] for one in (by_data, magnitude)]
    assert torch.equal(*masks) and nmcompile.verify(by_data).ok


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": ("weights", {}),
    "4 bits": ("inference", {}),
    "4 bits, packed": ("inference", {"container": "int4"}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_computes_the_same(name: str, tmp_path: Path) -> None:
    mode, options = FILES[name]
    model, x = generator().eval(), torch.randn(2, 16, 5, 5)
    path = tmp_path / "generator.onnx"
    calibration = [x] if mode == "inference" else None
    compiled = nmcompile.compile(model, mode, args=(x,), calibration=calibration, config=ALL).eval()
    nmcompile.export(compiled, path, (x,), **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other = torch.randn(3, 16, 5, 5)
    [found] = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    expected = compiled(other).detach()
    distance = float((torch.from_numpy(found) - expected).norm() / expected.norm())
    assert distance < (1e-5 if mode == "weights" else 0.1)  # 4-bit activations may round to the next step
    checked = nmcompile.verify(path)
    assert checked.ok and sum(check.pattern is not None for check in checked.checks) >= 2
