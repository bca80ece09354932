"""Whole networks in integers: residual sums, concatenations and pooling between the layers of a file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, presets
from nmcompile.three_gemm.find_triples import triples_of
from tests.optimized_graphs import optimized

FLOATS = {"Conv", "FusedConv", "NhwcFusedConv", "Add", "Relu", "MaxPool", "Mul", "Sum"}
UNPRUNED = CompileConfig(layers={"_default": replace(presets["inference"], input=None)}, outputs="int8", ends="int8")
PRUNED = CompileConfig(outputs="int8", ends="int8")
X = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with a projection."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)
        self.project = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.project(x)
        return torch.relu(y)


class Inverted(nn.Module):
    """An inverted block with a depthwise convolution and a linear bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * width)
        self.narrow, self.norm3 = nn.Conv2d(4 * width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.expand(x)))
        return x + self.norm3(self.narrow(self.act(self.norm2(self.depthwise(y)))))


class Growing(nn.Module):
    """A block that concatenates its result to its input."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.conv(x))], 1)


def end(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 8)]


def stem(activation: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(3, 16, 3, padding=1), activation]


def network(name: str) -> nn.Sequential:
    layers = {
        "residual": [*stem(nn.ReLU()), nn.MaxPool2d(3, 2, 1), Block(16, 16), Block(16, 16), Block(16, 32), *end(32)],
        "inverted": [*stem(nn.ReLU6()), nn.Conv2d(16, 16, 1), Inverted(16), Inverted(16), *end(16)],
        "plain": [*stem(nn.ReLU()), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), *end(16)],
        "growing": [*stem(nn.ReLU()), Growing(16, 16), Growing(32, 32), *end(64)],
    }
    torch.manual_seed(0)
    model = nn.Sequential(*layers[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean, module.running_var = 0.1 * torch.randn(module.num_features), torch.ones(1) + 0.5
            module.running_var = module.running_var.expand(module.num_features).clone()
    return model.eval()


def compiled(name: str, config: CompileConfig) -> nn.Module:
    return nmcompile.compile(network(name), "inference", args=(X,), config=config, calibration=[X]).eval()


@pytest.mark.parametrize("name", ["residual", "inverted", "plain", "growing"])
@pytest.mark.parametrize("config", [UNPRUNED, PRUNED], ids=["dense inputs", "4:8 inputs"])
def test_no_float_is_computed_between_the_layers(name: str, config: CompileConfig, tmp_path: Path) -> None:
    """The mean before the last layer alone stays in floats, with native operators in place of functions."""
    report = nmcompile.export(compiled(name, config), tmp_path / "m.onnx", (X,))
    assert report.verification is not None
    found = optimized(tmp_path / "m.onnx", native=True)
    convs = sum(isinstance(module, nn.Conv2d) for module in network(name).modules())
    assert found["QLinearConv"] == convs and not FLOATS & set(found)
    assert found["QLinearAdd"] == {"residual": 3, "inverted": 2}.get(name, 0)
    assert found["QLinearConcat"] == (2 if name == "growing" else 0) and found["Concat"] == 1  # of a shape
    assert found["QGemm"] == found["DequantizeLinear"] == 1 and found["QuantizeLinear"] == 2
    assert found["RoundIntegers"] == {"residual": 3, "plain": 0}.get(name, 2)
    assert found["NhwcMaxPool"] == (1 if name in ("residual", "plain") else 0)


@pytest.mark.parametrize("name", ["residual", "plain"])
def test_standard_operators_prune_integers_channels_last(name: str, tmp_path: Path) -> None:
    """Rows of places are all that is transposed, besides the ends of the network."""
    nmcompile.export(compiled(name, PRUNED), tmp_path / "m.onnx", (X,), verify=False)
    plain, native = optimized(tmp_path / "m.onnx"), optimized(tmp_path / "m.onnx", native=True)
    pruned = native["PruneIntegers_4_8_Features"]
    assert pruned > 0 and plain["Transpose"] == native["Transpose"] + 2 * pruned
    assert plain["NhwcMaxPool"] == 1 and plain["Split"] == plain["GreaterOrEqual"] == pruned


@torch.no_grad()
@pytest.mark.parametrize("config", [UNPRUNED, PRUNED], ids=["dense inputs", "4:8 inputs"])
def test_sums_are_whole_steps_and_fit_into_a_byte(config: CompileConfig) -> None:
    model = compiled("residual", config)
    sums: list[Tensor] = []
    for place in (3, 4, 5):
        model.get_submodule(str(place)).register_forward_hook(lambda _, __, result: sums.append(result))
    model(100 * torch.randn(16, 3, 16, 16))  # far beyond every clip
    steps = {triple.layer.name: triple.steps.output for triple in triples_of(model)}
    for place, x in zip((3, 4, 5), sums, strict=True):
        step = steps[f"{place}.conv2"]
        assert step is not None
        integers = x / step.current()
        assert torch.equal(integers, integers.round()) and torch.equal(integers * step.current(), x)
        assert 63 < integers.max() <= 255
    assert steps["0"] is steps["3.conv2"] is steps["4.conv2"] is not steps["5.conv2"] is steps["5.project"]


@torch.no_grad()
def test_a_shared_step_survives_saving(tmp_path: Path) -> None:
    model = compiled("residual", UNPRUNED)
    other = nmcompile.compile(network("residual"), "inference", args=(X,), config=UNPRUNED, calibration=[X + 1])
    other.load_state_dict(model.state_dict())
    nmcompile.load_sparse_state_dict(other, nmcompile.sparse_state_dict(model))
    assert torch.equal(other.eval()(X), model(X))


def test_a_stream_with_a_dense_layer_keeps_steps_of_its_own() -> None:
    model = compiled("residual", replace(UNPRUNED, ends="dense"))
    rows = {layer.name: layer.plan.grid_row("output") for layer in nmcompile.inspect(model).layers}
    assert rows["0"] is None
    for name, stream in (("3.conv2", ()), ("5.conv2", ("5.conv2", "5.project"))):
        row = rows[name]
        assert row is not None and row.stream == stream
