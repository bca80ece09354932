"""Results on 8-bit grids if no quantized layer reads them, and the result of an absorbed batch norm in eval()."""

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.capture import capture_model
from nmcompile.quantization import Grid, fake_quantize, sawb_scale
from nmcompile.three_gemm.absorbed_norm import AbsorbedNorm
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.training import clips
from tests.optimized_graphs import optimized

WIDE = {"layers": {"_default": replace(nmcompile.presets["inference"], input=None)}, "outputs": "int8"}


class Net(nn.Module):
    """A residual block after a stem, a layer that feeds another via norm and ReLU, and one with its ReLU in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm1(self.conv1(x)))
        z = F.relu(self.norm2(self.conv2(y)) + x)
        return self.fc((F.relu(self.conv3(z)) + z).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(torch.randn(8, 3, 6, 6))
    for norm in (net.norm1, net.norm2):
        nn.init.normal_(norm.weight)  # some gains are negative
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        net.norm2.weight[3] = 0.0
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def compiled(net: nn.Module, x: Tensor, **options: object) -> nn.Module:
    config = CompileConfig(**(WIDE | options))  # type: ignore[arg-type]
    return nmcompile.compile(net, "inference", args=(x,), config=config, calibration=[x]).eval()


def norm_of(model: nn.Module, name: str) -> Any:
    norm = model.get_submodule(name)
    assert isinstance(norm, AbsorbedNorm)
    return norm


def test_facts_name_the_norm_and_the_readers(net: nn.Module, x: Tensor) -> None:
    for args in (None, (x,)):
        facts = capture_model(net, args).facts
        assert {name: fact.norm for name, fact in facts.items() if fact.norm} == {"conv1": "norm1", "conv2": "norm2"}
        assert facts["conv1"].readers == {"conv2"}
        assert facts["conv2"].readers == {""} == facts["conv3"].readers
        assert facts["stem"].readers == {"conv1", ""}
        assert facts["fc"].readers == frozenset()  # returned


def test_a_norm_that_something_else_reads_too_is_not_absorbed(net: Net, x: Tensor) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv1(F.relu(self.stem(x)))
            return self.fc((self.norm1(y) + self.norm1(self.conv2(y))).mean((2, 3)))

    for args in (None, (x,)):
        facts = capture_model(Twice().eval(), args).facts
        assert not any(fact.norm for fact in facts.values())


def test_the_plan_quantizes_what_is_read_in_floating_point(net: nn.Module, x: Tensor) -> None:
    def outputs(**options: object) -> dict[str, str]:
        layers = nmcompile.inspect(compiled(net, x, **options)).layers
        rows = {layer.name: layer.plan.grid_row("output") for layer in layers}
        return {name: str(row.grid) for name, row in rows.items() if row is not None}

    assert outputs() == {"conv2": "s8", "conv3": "u7"}
    assert outputs(outputs="float") == {}
    report = nmcompile.analyze(net, "inference", args=(x,), config=CompileConfig(outputs="int8"))
    assert "absorbs 'norm2' in eval()" in report.to_markdown() and '"norm": "norm2"' in report.to_json()
    assert outputs(layers={}) == outputs()  # 4:8 pruning reads integers


@torch.no_grad()
def test_eval_hands_on_whole_steps_of_the_accumulator(net: Net, x: Tensor) -> None:
    """In fp64, (gain W x + shift) / (|gain| × steps of weight and input) is an integer."""
    net, x = net.double(), x.double()
    model = compiled(net, x, outputs="float")
    for conv, name in (("conv1", "norm1"), ("conv2", "norm2")):
        norm, seen = norm_of(model, name), list[Tensor]()
        handle = norm.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        model(x)
        handle.remove()
        plain = getattr(net, name)
        gain = plain.weight / (plain.running_var + plain.eps).sqrt()
        triple = next(triple for triple in triples_of(model) if triple.layer.name == conv)
        step = sawb_scale(getattr(net, conv).weight, 4) * float(triple.steps.of_input())  # type: ignore[arg-type]
        step = torch.where(gain == 0, 1.0, gain.abs()) * step
        ratio = seen[0] / step.view(-1, 1, 1)
        assert bool(((ratio - ratio.round()).abs() < 1e-8).all())
        # and next to the unrounded norm: half a step at most.
        dense = plain(F.conv2d(*operands(model, conv, x), padding=1))
        assert bool((((seen[0] - dense) / step.view(-1, 1, 1)).abs() < 0.5 + 1e-8).all())


def operands(model: nn.Module, conv: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the quantized input, weight and rounded bias of a layer."""
    plain, layer, seen = nmcompile.finalize(model), model.get_submodule(conv), list[Tensor]()
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    handle.remove()
    step = next(triple for triple in triples_of(model) if triple.layer.name == conv).steps.of_input()
    assert step is not None
    module = plain.get_submodule(conv)
    assert isinstance(module, nn.Conv2d)
    return fake_quantize(seen[0], step, Grid(4, signed=False)), module.weight, module.bias


def test_training_keeps_the_norm_and_passes_gradients_through_the_grid(net: Net, x: Tensor) -> None:
    model = compiled(net, x, clip="pact").train()
    norm = norm_of(model, "norm2")
    step = norm.absorbing_layer.three_gemms[""].steps.output
    assert step is not None and not any(step.clip is clip for clip in clips(model))
    step.calibrate(1.0)
    y = torch.randn(8, 16, 6, 6, requires_grad=True)
    norm(y).square().sum().backward()

    other, plain = y.detach().clone().requires_grad_(), copy.deepcopy(net.norm2).train()
    dense = plain(other)
    quantized = (dense * 127).round().clamp(-127, 127) / 127
    torch.testing.assert_close(norm(y), quantized, rtol=1e-5, atol=1e-5)
    grad = 2 * quantized.detach()
    (expected,) = torch.autograd.grad(dense, other, torch.where(dense.abs() <= 1, grad, 0.0))
    torch.testing.assert_close(y.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_stays_what_it_was(net: Net, x: Tensor) -> None:
    model = compiled(net, x)
    assert isinstance(model.get_submodule("norm2"), nn.BatchNorm2d)
    assert list(model.state_dict()) == list(net.state_dict())
    assert type(nmcompile.decompile(model).get_submodule("norm2")) is nn.BatchNorm2d
    again = pickle.load(io.BytesIO(pickle.dumps(model)))
    for replica in (copy.deepcopy(model), again):
        assert norm_of(replica, "norm2").absorbing_layer is replica.get_submodule("conv2")
        assert torch.equal(replica(x), model(x))


def test_it_compiles_with_torch(net: nn.Module, x: Tensor) -> None:
    model = compiled(net, x)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), model(x))


def test_a_linear_layer_along_tokens_keeps_its_norm_apart(x: Tensor) -> None:
    """BatchNorm1d takes dim 1 of three for channels; a linear layer's features are the last dim."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 4)
    net = nn.Sequential(*layers).eval()
    nn.init.normal_(layers[2].running_mean)  # type: ignore[arg-type]
    for shape in ((8, 16), (8, 16, 16)):
        x = torch.randn(*shape)
        model = compiled(net, x, outputs="float")
        norm = norm_of(model, "2")
        y = torch.randn(*shape)
        is_absorbed = not torch.equal(norm(y), net[2](y))
        assert is_absorbed == (len(shape) == 2)


@pytest.mark.parametrize("layers", [WIDE["layers"], {}], ids=["inputs dense", "inputs 4:8"])
def test_the_file_equals_the_model_and_its_kernels_are_integer(
    net: nn.Module, x: Tensor, tmp_path: Path, layers: dict[str, object]
) -> None:
    model = compiled(net, x, layers=layers)
    report = nmcompile.export(model, tmp_path / "model.onnx", (x,))
    assert report.verification is not None and max(check.relative_l2 for check in report.verification.runtimes) < 1e-5
    assert "s8" in str(report) and "u7" in str(report)
    kernels = optimized(tmp_path / "model.onnx")
    assert kernels["QLinearConv"] == 3 and kernels["Conv"] + kernels["FusedConv"] == 1


def test_tensorrt_files_hold_signed_integers_only(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    nmcompile.export(compiled(net, x), tmp_path / "model.onnx", (x,), target="tensorrt")
    graph = onnx.load(tmp_path / "model.onnx").graph
    zeros = [tensor for tensor in graph.initializer if "zero_point" in tensor.name]
    assert zeros and all(tensor.data_type == onnx.TensorProto.INT8 for tensor in zeros)
    assert not any(onnx.numpy_helper.to_array(tensor).any() for tensor in zeros)


def test_a_norm_behind_an_output_on_its_grid_is_not_absorbed(tmp_path: Path) -> None:
    """Functional norms are not modules that could compute export's result."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.register_buffer("mean", torch.randn(8))
            self.register_buffer("var", torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.batch_norm(self.convs[1](F.relu(self.convs[0](x))), self.mean, self.var)  # type: ignore[arg-type]
            return torch.sigmoid(y)

    torch.manual_seed(0)
    x = torch.randn(4, 8, 6, 6)
    model = compiled(Functional().eval(), x)
    row = nmcompile.inspect(model).layer("convs.1").plan.grid_row("output")
    assert row is not None and row.phase is Phase.FORWARD and str(row.grid) == "s8"
    nmcompile.export(model, tmp_path / "model.onnx", (x,))
    assert any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "model.onnx").graph.node)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(16, 32), nn.Linear(32, 5)
        self.norm, self.attend = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        return self.fc((x + self.attend(y, y, y, need_weights=False)[0])[:, 0])


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Attention(), (2, 9, 16)),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(72, 4)), (2, 8, 3, 3)),
    ],
    ids=["attention", "flatten"],
)
def test_results_that_are_reshaped(net: nn.Module, shape: tuple[int, ...], target: str, tmp_path: Path) -> None:
    """ONNX Runtime moves quantization after a Reshape."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    model = compiled(net.eval(), x, layers={})
    assert any(triple.steps.output is not None for triple in triples_of(model))
    report = nmcompile.export(model, tmp_path / "model.onnx", (x,), target=target)
    assert report.verification is not None
