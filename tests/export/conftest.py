"""Deployed models, made without the compiler: the writer is judged by plain PyTorch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmcompile.export.deployed_layer import DeployedActivation, DeployedLayer, DeployedWeight
from nmcompile.ir.layers import Layer, LinearLayer, conv_layer
from nmcompile.pruning import NMPattern, greedy, greedy_by_value
from nmcompile.quantization import Grid, fake_quantize

TWO_OF_FOUR = NMPattern(2, 4)
FOUR_OF_EIGHT = NMPattern(4, 8)


@dataclass
class Deployed:
    """A model with zeros in its weights, the same model that also prunes and quantizes its inputs, and its layers."""

    plain: nn.Module
    reference: nn.Module
    layers: dict[str, DeployedLayer]


def layer_of(name: str, module: nn.Module) -> Layer:
    if isinstance(module, nn.Linear):
        return LinearLayer(name, tuple(module.weight.shape), module.bias is not None)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return conv_layer(
        name,
        module.weight.shape,
        module.bias is not None,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def deploy_model(
    model: nn.Module,
    *,
    pattern: NMPattern | None = TWO_OF_FOUR,
    weight_bits: int | None = 4,
    input_bits: int | None = 4,
    prune_inputs: bool = False,
    per_channel: bool = False,
) -> Deployed:
    """Prune and quantize every conv and linear module of a model in eval mode."""
    plain = copy.deepcopy(model).eval()
    layers = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            layer = layer_of(name, module)
            weight = _weight(name, module, layer, pattern, weight_bits, per_channel)
            module.weight.data.copy_(weight.values)
            inputs = DeployedActivation(FOUR_OF_EIGHT if prune_inputs else None)
            if input_bits is not None:
                inputs = DeployedActivation(inputs.pattern, Grid(input_bits, signed=not prune_inputs), 0.125)
            layers[name] = DeployedLayer(layer, weight, inputs, module=name)
    reference = copy.deepcopy(plain)
    for name, deployed in layers.items():
        reference.get_submodule(name).register_forward_pre_hook(_prepared(deployed))
    return Deployed(plain, reference, layers)


def _weight(
    name: str, module: nn.Module, layer: Layer, pattern: NMPattern | None, bits: int | None, per_channel: bool
) -> DeployedWeight:
    assert isinstance(module.weight, Tensor)
    dense, parameter = module.weight.detach(), f"{name}.weight".removeprefix(".")
    values = dense if pattern is None else greedy(dense, pattern, dim=layer.in_dim)
    if bits is None:
        return DeployedWeight(parameter, pattern, values)
    grid = Grid(bits, signed=True)
    dims = tuple(range(1, dense.dim()))
    scale = (dense.abs().amax(dims, keepdim=True) if per_channel else dense.abs().max()) / grid.high
    return DeployedWeight(parameter, pattern, fake_quantize(values, scale, grid), grid, scale)


def _prepared(layer: DeployedLayer) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x, wanted = args[0], layer.input
        if wanted.grid is not None:
            assert wanted.scale is not None
            x = fake_quantize(x, wanted.scale, wanted.grid)
        if wanted.pattern is not None:
            x = greedy_by_value(x, wanted.pattern, dim=layer.layer.channel_dim)
        return (x,)

    return hook


class Net(nn.Module):
    """Convs with norms, a residual, a norm with negative and zero gammas, a linear on three and on two dims."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.token = nn.Linear(16, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x.relu())).relu()
        y = (self.norm2(self.conv(y)) + y).relu()
        z: Tensor = self.token(y.flatten(2).transpose(1, 2)).relu()
        return self.head(z.mean(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.norm, model.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        norm.weight.data[0] = 0
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def deploy() -> Callable[..., Deployed]:
    return deploy_model
