"""`placement="activation"`: pruned and quantized after the ReLU, compared with the same written out in torch."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.capture import capture_model
from nmcompile.errors import ExportError, PreconditionError
from nmcompile.export import write_onnx
from nmcompile.export.collect_layers import deployed_layers
from nmcompile.ir.operations import to_accumulator
from nmcompile.pruning import greedy_by_value
from nmcompile.quantization import Grid, integers, sawb_quantize, sawb_scale
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training import clips

ACTIVATION = CompileConfig(placement="activation")


class Net(nn.Module):
    """Conv, ReLU, norm, as in CREPE, so GEMM inputs are signed; a branch; a layer without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.relu(self.conv1(x)))
        z = F.relu(self.conv2(y)) + y
        return self.fc(self.conv3(z).mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(torch.randn(8, 3, 6, 6))
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def compiled(net: nn.Module, x: Tensor, config: CompileConfig = ACTIVATION) -> nn.Module:
    return nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x]).eval()


def clip_of(model: nn.Module, layer: str) -> Tensor:
    triple = next(triple for triple in triples_of(model) if triple.layer.name == layer)
    assert triple.steps.output is not None
    return triple.steps.output.clip.detach()


def test_facts_name_what_feeds_a_layer_and_what_a_relu_follows(net: nn.Module, x: Tensor) -> None:
    for args in (None, (x,)):
        facts = capture_model(net, args).facts
        assert facts["conv2"].sources == {"conv1"}
        assert facts["conv3"].sources == {"conv1", "conv2"}
        assert facts["conv1"].sources == {""}
        assert {name for name, fact in facts.items() if fact.rectified} == {"conv1", "conv2"}


def test_plan_prunes_where_activations_arise(net: nn.Module, x: Tensor) -> None:
    plan = nmcompile.inspect(compiled(net, x)).program.plan
    rows = {one.layer.name: {(r.operand, str(r.pattern or r.grid)) for r in one.rows_of(Phase.FORWARD)} for one in plan}
    both = {("output", "4:8"), ("output", "u4")}
    assert both <= rows["conv1"]
    assert rows["conv2"] == {("weight", "2:4"), (None, "None"), ("weight", "s4")} | both
    assert rows["conv3"] == {("weight", "2:4"), (None, "None"), ("weight", "s4")}
    assert rows["fc"] == {(None, "None")}


def test_a_layer_named_exactly_takes_its_input_as_it_comes(net: nn.Module, x: Tensor) -> None:
    config = replace(ACTIVATION, layers={"conv2": nmcompile.presets["inference"]})
    plan = nmcompile.inspect(compiled(net, x, config)).layer("conv2").plan
    assert plan.find(Phase.FORWARD, "input") is None and plan.find(Phase.FORWARD, "output") is not None


def test_an_output_that_no_pattern_fits_has_a_reason() -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 8)).eval()
    report = nmcompile.analyze(net, "activations", config=replace(ACTIVATION, ends="sparse"))
    assert "12 channels are not a multiple of 8" in "".join(report.layer("0").reasons)
    assert "not a multiple of 8" in "".join(report.layer("2").reasons)  # its input is not pruned


class Branching(nn.Module):
    """A module that fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) if x.sum() > 0 else x


def test_without_a_graph_it_is_refused() -> None:
    with pytest.raises(PreconditionError, match="needs the whole graph"):
        nmcompile.compile(Branching(), "inference", config=ACTIVATION)


def test_forward_equals_the_same_in_plain_torch(net: nn.Module, x: Tensor) -> None:
    model = compiled(net, x)

    def activation(y: Tensor, layer: str) -> Tensor:
        grid = Grid(4, signed=False)
        step = clip_of(model, layer) / grid.high
        return greedy_by_value(integers(F.relu(y), step, grid) * step, "4:8", dim=1)

    def weight(conv: nn.Conv2d) -> Tensor:
        return sawb_quantize(conv.weight, 4, mask=nmcompile.pruning.mask(conv.weight, "2:4", dim=1))

    assert isinstance(net, Net)
    y = net.norm(activation(net.conv1(x), "conv1"))
    z = activation(F.conv2d(y, weight(net.conv2), net.conv2.bias, padding=1), "conv2") + y
    expected = net.fc(F.conv2d(z, weight(net.conv3), net.conv3.bias).mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", ["mse", "pact"])
def test_gradients_equal_those_of_straight_through_estimation(clip: str) -> None:
    """No gradient passes where an activation was clipped or rounded to zero; clipped values move the clip."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(32, 8)
    config = CompileConfig(placement="activation", clip=clip)
    model = nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x])
    steps = next(triple for triple in triples_of(model) if triple.layer.name == "1").steps
    assert steps.input is not None and steps.output is not None
    steps.output.calibrate(top := clip_of(model, "1") / 2)
    activation = model.get_submodule("2")
    kept: list[Tensor] = []
    activation.register_forward_hook(lambda module, args, y: kept.append(y))
    output = model(x)
    (y,) = kept
    (gradient,) = torch.autograd.grad(output.square().sum(), y, retain_graph=True)
    output.square().sum().backward()

    step = steps.input.current()
    input = integers(net[0](x), step, Grid(4, signed=True)) * step
    linear = net[1]
    assert isinstance(linear, nn.Linear) and linear.bias.grad is not None
    mask = nmcompile.pruning.mask(linear.weight, "2:4")
    bias = to_accumulator(linear.bias, step, sawb_scale(linear.weight, 4))
    dense = F.linear(input, sawb_quantize(linear.weight, 4, mask=mask), bias)
    torch.testing.assert_close(linear.bias.grad, torch.where((y > 0) & (dense <= top), gradient, 0.0).sum(0))
    if clip == "pact":
        assert any(steps.output.clip is one for one in clips(model))
        expected = torch.where((y > 0) & (dense > top), gradient, 0.0).sum()
        torch.testing.assert_close(steps.output.clip.grad, expected)
    else:
        assert not clips(model)


def test_state_holds_the_clips_of_outputs(net: nn.Module, x: Tensor) -> None:
    model = compiled(net, x)
    state = nmcompile.sparse_state_dict(model)
    assert {name for name in state if name.endswith("clip")} == {"conv1.output_clip", "conv2.output_clip"}
    other = nmcompile.compile(net, "inference", args=(x,), config=ACTIVATION).eval()
    with pytest.raises(nmcompile.NMCompileError, match="layer 'conv1': its output is to be quantized"):
        other(x)
    nmcompile.load_sparse_state_dict(other, state)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("mode", ["inference", "activations"])
def test_files_compute_the_same(net: nn.Module, x: Tensor, mode: str, target: str, tmp_path: Path) -> None:
    calibration = [x] if mode == "inference" else None
    model = nmcompile.compile(net, mode, args=(x,), config=ACTIVATION, calibration=calibration).eval()
    report = nmcompile.export(model, tmp_path / "m.onnx", (x,), target=target)
    assert report.verification is not None
    assert all(check.ok for check in report.verification.layers)
    assert all(check.ok for check in report.verification.runtimes)
    assert "4:8" in str(report)


def test_a_model_that_ends_in_a_relu_keeps_the_name_of_its_output(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1), nn.ReLU()).eval()
    x = torch.randn(2, 8, 4, 4)
    dense = nmcompile.export(nmcompile.compile(net, "weights", args=(x,)).eval(), tmp_path / "dense.onnx", (x,))
    pruned = nmcompile.export(compiled(net, x), tmp_path / "pruned.onnx", (x,))
    names = [[value.name for value in onnx.load(report.onnx.path).graph.output] for report in (dense, pruned)]
    assert names[0] == names[1]


def test_export_refuses_to_quantize_behind_a_relu_that_is_not_there(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    model = compiled(net, x)
    layers = deployed_layers(model)
    layers["conv3"] = replace(layers["conv3"], output=layers["conv1"].output)
    with pytest.raises(ExportError, match="layer 'conv3': its output is to be pruned and quantized after a ReLU"):
        write_onnx(nmcompile.finalize(model), layers, tmp_path / "m.onnx", (x,))
    assert not (tmp_path / "m.onnx").exists()
