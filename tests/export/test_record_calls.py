"""Layers and norms whose modules do more than their operator are compared with the operator's own results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

import nmcompile
from nmcompile.errors import ExportError
from nmcompile.export import Example, verify_onnx
from nmcompile.export.collect_layers import deployed_layers

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class NormAct(nn.BatchNorm2d):
    """A norm with an activation, as in timm."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class Padded(nn.Conv2d):
    """A convolution that pads and activates by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias).tanh()


class Scaled(nn.Linear):
    """A layer that scales its input, then runs the forward of its base."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2).relu()


def own_forwards() -> nn.Module:
    return nn.Sequential(
        Padded(8, 16, 3), nn.Conv2d(16, 16, 3, bias=False), NormAct(16), Padded(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding=1), NormAct(16), nn.Flatten(), Scaled(256, 16), nn.Linear(16, 4),
    )  # fmt: skip


def timm_blocks() -> nn.Module:
    return nn.Sequential(
        ConvNormAct(8, 16, 3), ConvNormAct(16, 16, 3), Conv2dSame(16, 16, 3),
        BatchNormAct2d(16), nn.Flatten(), nn.Linear(576, 4),
    )  # fmt: skip


def compiled(model: nn.Module, mode: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
    return nmcompile.compile(model.eval(), mode, args=(X,), calibration=[X]).eval()


@pytest.mark.parametrize("mode", ["weights", "inference"])
@pytest.mark.parametrize("make", [own_forwards, timm_blocks])
def test_modules_that_do_more_than_their_operator_are_compared_layer_by_layer(
    make: Any, mode: str, tmp_path: Path
) -> None:
    model = compiled(make(), mode)
    report = nmcompile.export(model, tmp_path / "m.onnx", (X,))
    assert report.verification is not None and all(check.relative_l2 < 1e-5 for check in report.verification.runtimes)
    checked = {check.node for check in report.verification.layers}
    assert checked == {layer.name for layer in nmcompile.inspect(model).layers}


def test_damage_to_such_a_layer_is_found_at_the_layer(tmp_path: Path) -> None:
    model, path = compiled(own_forwards(), "weights"), tmp_path / "m.onnx"
    report = nmcompile.export(model, path, (X,), verify=False).onnx
    for damaged in ("0.weight", "1.weight", "1.bias", "4.bias.2", "7.weight"):
        proto = onnx.load(path)
        [tensor] = [t for t in proto.graph.initializer if t.name == damaged]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), damaged))
        onnx.save(proto, tmp_path / "damaged.onnx")
        with pytest.raises(ExportError, match=f"layer '{damaged[0]}' does not compute the same as torch"):
            verify_onnx(replace(report, path=tmp_path / "damaged.onnx"), deployed_layers(model), model, [Example((X,))])


class AddsItsOwn(nn.Module):
    """A layer without a bias, to whose output the model adds a parameter (ConvBERT's separable convolution)."""

    def __init__(self, layer: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.layer, self.shift = layer, nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        y += self.shift
        return y


@pytest.mark.parametrize("mode", ["weights", "inference"])
def test_a_parameter_that_the_model_adds_is_not_the_bias_of_the_layer(mode: str, tmp_path: Path) -> None:
    conv = AddsItsOwn(nn.Conv2d(8, 16, 3, bias=False), torch.randn(16, 1, 1))
    linear = AddsItsOwn(nn.Linear(16, 16, bias=False), torch.randn(16))
    model = compiled(nn.Sequential(conv, nn.Flatten(2), Turned(), linear, nn.Linear(16, 4)), mode)
    report = nmcompile.export(model, tmp_path / "m.onnx", (X,))
    assert report.verification is not None
    assert {"0.layer", "3.layer"} <= {check.node for check in report.verification.layers}


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
