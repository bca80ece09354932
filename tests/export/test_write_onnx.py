import getpass
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from nmcompile.errors import ConfigError, ExportError
from nmcompile.export import Example, OnnxReport, verify_onnx, write_onnx
from nmcompile.export.deployed_layer import DeployedActivation, DeployedLayer, DeployedWeight
from nmcompile.ir.layers import LinearLayer
from nmcompile.pruning import NMPattern, greedy
from nmcompile.quantization import Grid, fake_quantize

Deploy = Callable[..., Any]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int8": ({}, {}),
    "int8-per-channel": ({"per_channel": True}, {}),
    "int8-pruned-inputs": ({"prune_inputs": True}, {}),
    "int8-pruned-inputs-8-bit": ({"prune_inputs": True, "input_bits": 8}, {}),
    "int4": ({"per_channel": True}, {"container": "int4"}),
    "weight-only": ({"input_bits": None}, {}),
    "inputs-only": ({"weight_bits": None}, {}),
    "fp32": ({"weight_bits": None, "input_bits": None}, {}),
    "fp32-pruned-inputs": ({"weight_bits": None, "input_bits": None, "prune_inputs": True}, {}),
    "fp16": ({"weight_bits": None, "input_bits": None}, {"precision": "fp16"}),
    "one-batch-size": ({}, {"dynamic_batch": False}),
}


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    [result] = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(result)


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(
    ("variant", "target"),
    [(variant, "onnxruntime") for variant in VARIANTS]
    + [(variant, "tensorrt") for variant in ("int8", "int8-pruned-inputs-8-bit", "int4", "fp16")],
)
def test_file_computes_what_torch_computes(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path, variant: str, target: str
) -> None:
    """Strict, within fp32 rounding, where the integer Clip, the flipped norms or the 4:8 function could be wrong."""
    how, options = VARIANTS[variant]
    if (variant, target) == ("int4", "tensorrt"):
        how = how | {"input_bits": None}
    model = deploy(net, **how)
    report = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,), target=target, **options)
    onnx.checker.check_model(str(report.path), full_check=True)
    verified = verify_onnx(report, model.layers, model.reference, [Example((images,))])
    assert {check.node for check in verified.layers} == set(model.layers)
    tight = 2e-3 if variant == "fp16" else 1e-5
    assert max(check.relative_l2 for check in verified.runtimes) < tight
    assert max(check.most_steps for check in verified.layers) < 0.01


def write(model: Any, path: Path, images: Tensor, **options: Any) -> OnnxReport:
    return write_onnx(model.plain, model.layers, path, (images,), **options)


def test_batch_size_is_open(net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path) -> None:
    model = deploy(net)
    path = write(model, tmp_path / "m.onnx", images[:1]).path
    for size in (1, 3):
        x = torch.randn(size, 8, 6, 6)
        torch.testing.assert_close(run(path, x), model.reference(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_missing_torchvision_is_not_mentioned(
    net: nn.Module,
    images: Tensor,
    deploy: Deploy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = importlib.util.find_spec
    asked = []

    def find(name: str, *rest: Any) -> Any:
        asked.append(name)
        return None if name == "torchvision" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    write(deploy(net), tmp_path / "m.onnx", images[:1])
    assert "torchvision" in asked and "torchvision" not in caplog.text


def test_nested_and_keyword_inputs_share_one_batch(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> Tensor:
            return pair[0] + pair[1] * scale

    x = torch.randn(1, 4)
    write_onnx(Pair().eval(), {}, tmp_path / "m.onnx", ((x, x),), kwargs={"scale": torch.ones(4)})
    a, b = torch.randn(2, 5, 4)
    torch.testing.assert_close(run(tmp_path / "m.onnx", a, b, torch.full((4,), 2.0)), a + 2 * b)


def test_integers_are_those_of_the_layer_with_the_sign_of_gamma(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path
) -> None:
    model = deploy(net)
    stored = initializers(write(model, tmp_path / "m.onnx", images).path)
    weight = model.layers["stem"].weight
    state = net.state_dict()
    gamma, variance = state["norm.weight"], state["norm.running_var"]
    integers = torch.round(weight.values / weight.scale) * gamma.sign().reshape(-1, 1, 1, 1)
    assert stored["stem.weight_quantized"].dtype == np.int8
    assert torch.equal(torch.tensor(stored["stem.weight_quantized"]).float(), integers)
    gain = (gamma / (variance + 1e-5).sqrt()).abs()
    scale = torch.where(gain > 0, weight.scale * gain, weight.scale)
    torch.testing.assert_close(torch.tensor(stored["stem.weight_scale"]), scale.detach())


def test_layers_without_norm_keep_one_scale(net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path) -> None:
    model = deploy(net)
    stored = initializers(write(model, tmp_path / "m.onnx", images).path)
    assert stored["token.weight_scale"].shape == ()
    assert float(stored["token.weight_scale"]) == float(model.layers["token"].weight.scale)


def test_int4_halves_the_weights_of_other_patterns(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path
) -> None:
    model = deploy(net, pattern=NMPattern(4, 8))
    for container, elements_per_byte in (("int8", 1), ("int4", 2)):
        path = write(model, tmp_path / f"{container}.onnx", images, container=container).path
        weights = [t for t in onnx.load(path).graph.initializer if t.name.endswith("weight_quantized")]
        assert len(weights) == 4
        for tensor in weights:
            assert len(tensor.raw_data) * elements_per_byte == np.prod(tensor.dims)


@pytest.mark.parametrize(
    ("target", "kind", "ends"), [("onnxruntime", np.uint8, (128, 121, 135)), ("tensorrt", np.int8, (0, -7, 7))]
)
def test_inputs_are_quantized_then_clipped_as_integers(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path, target: str, kind: type, ends: tuple[int, ...]
) -> None:
    model = deploy(net)
    path = write(model, tmp_path / "m.onnx", images, target=target).path
    graph = onnx.load(path).graph
    stored = initializers(path)
    [conv] = [node for node in graph.node if node.name == "conv"]
    producers = {name: node for node in graph.node for name in node.output}
    dequantize = producers[conv.input[0]]
    clip = producers[dequantize.input[0]]
    quantize = producers[clip.input[0]]
    assert (dequantize.op_type, clip.op_type, quantize.op_type) == ("DequantizeLinear", "Clip", "QuantizeLinear")
    zero, low, high = (stored[name] for name in (quantize.input[2], *clip.input[1:]))
    assert {zero.dtype, low.dtype, high.dtype} == {np.dtype(kind)}
    assert (int(zero), int(low), int(high)) == ends


@pytest.mark.parametrize(
    ("target", "chain"),
    [
        ("onnxruntime", ["QuantizeLinear", "Clip", "PruneIntegers_4_8_Channels", "DequantizeLinear"]),
        (
            "tensorrt",
            ["Div", "Round", "Clip", "Mul", "PruneByValue_4_8_Channels", "QuantizeLinear", "DequantizeLinear"],
        ),
    ],
)
def test_inputs_are_pruned_after_they_are_rounded(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path, target: str, chain: list[str]
) -> None:
    path = write(deploy(net, prune_inputs=True), tmp_path / "m.onnx", images, target=target).path
    graph = onnx.load(path).graph
    producers = {name: node for node in graph.node for name in node.output}
    [node] = [node for node in graph.node if node.name == "conv"]
    found = []
    for _ in chain:
        node = producers[node.input[0]]
        found.append(node.op_type)
    assert found == chain[::-1]


def test_nodes_are_named_after_layers(net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path) -> None:
    report = write(deploy(net), tmp_path / "m.onnx", images)
    gemms = [n for n in onnx.load(report.path).graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert [node.name for node in gemms] == ["stem", "conv", "token", "head"]
    assert [(n.name, n.norm) for n in report.nodes] == [
        ("stem", "norm"),
        ("conv", "norm2"),
        ("token", ""),
        ("head", ""),
    ]


def test_module_called_twice_has_two_nodes_and_one_weight(deploy: Deploy, tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).relu())

    model, x = deploy(Twice()), torch.randn(4, 8)
    report = write(model, tmp_path / "m.onnx", x)
    assert [node.name for node in report.nodes] == ["linear", "linear#2"]
    assert len([name for name in initializers(report.path) if "weight_quantized" in name]) == 1
    torch.testing.assert_close(run(report.path, x), model.reference(x).detach())


def test_layers_that_share_a_weight_keep_their_own_inputs(deploy: Deploy, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = deploy(Tied()), torch.randn(4, 8)
    for name, scale in (("a", 0.5), ("b", 0.25)):
        layer = model.layers[name]
        object.__setattr__(layer.weight, "name", "a.weight")
        object.__setattr__(layer.input, "scale", scale)
    report = write(model, tmp_path / "m.onnx", x)
    assert [node.name for node in report.nodes] == ["a", "b"]
    torch.testing.assert_close(run(report.path, x), model.reference(x).detach())


def test_packed_projection_of_cross_attention_is_split(deploy: Deploy, tmp_path: Path) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, y, y * 2, need_weights=False)[0]

    plain, grid = Cross().eval(), Grid(4, signed=True)
    packed = plain.attention.in_proj_weight
    scale = packed.detach().abs().amax(1, keepdim=True) / 7
    packed.data = fake_quantize(greedy(packed.detach(), "2:4"), scale, grid)
    weight = DeployedWeight("attention.in_proj_weight", NMPattern(2, 4), packed.detach(), grid, scale)
    layer = DeployedLayer(LinearLayer("attention.in_proj", (24, 8), True), weight, DeployedActivation())
    x, y = torch.randn(2, 2, 3, 8)
    report = write_onnx(plain, {"attention.in_proj": layer}, tmp_path / "m.onnx", (x, y))
    assert len(report.nodes) == 3
    torch.testing.assert_close(run(report.path, x, y), plain(x, y).detach())


def test_file_tells_nothing_about_the_machine(net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path) -> None:
    content = write(deploy(net, prune_inputs=True), tmp_path / "m.onnx", images).path.read_bytes()
    secrets = [os.getcwd(), os.path.expanduser("~"), __file__, "self.stem(", ".py", f"/{getpass.getuser()}"]
    assert [text for text in secrets if text.encode() in content] == []


def test_model_and_random_state_stay_as_they_were(
    net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path
) -> None:
    model = deploy(net, weight_bits=None, input_bits=None)
    before, state = {k: v.clone() for k, v in model.plain.state_dict().items()}, torch.get_rng_state()
    write(model, tmp_path / "m.onnx", images, precision="fp16")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.plain.state_dict().items())
    assert next(model.plain.parameters()).dtype == torch.float32


def test_norm_that_others_read_too_stays(deploy: Deploy, tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model, x = deploy(Branch()), torch.randn(2, 8, 3, 3)
    report = write(model, tmp_path / "m.onnx", x)
    assert report.nodes[0].norm == ""
    assert "BatchNormalization" in {node.op_type for node in onnx.load(report.path).graph.node}
    torch.testing.assert_close(run(report.path, x), model.reference(x).detach(), rtol=1e-4, atol=1e-5)


def test_linear_without_bias_absorbs_its_norm(deploy: Deploy, tmp_path: Path) -> None:
    model = deploy(nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)))
    for key in ("running_mean", "weight"):
        for module in (model.plain[1], model.reference[1]):
            getattr(module, key).data.copy_(torch.linspace(-1, 1, 8))
    report = write(model, tmp_path / "m.onnx", x := torch.randn(4, 8))
    assert (report.nodes[0].op, report.nodes[0].norm) == ("Gemm", "1")
    torch.testing.assert_close(run(report.path, x), model.reference(x).detach(), rtol=1e-4, atol=1e-5)


def test_wrong_requests_are_refused(net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path) -> None:
    model, path = deploy(net), tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="did you mean 'tensorrt'"):
        write(model, path, images, target="tensort")
    with pytest.raises(ExportError, match=r"layer 'stem'.*INT4 weights only where the input is not quantized"):
        write(model, path, images, target="tensorrt", container="int4")
    with pytest.raises(ExportError, match=r"layer 'stem' is quantized.*fp16"):
        write(model, path, images, precision="fp16")
    model.plain.norm.train()
    with pytest.raises(ExportError, match=r"module 'norm' is in train mode; call model.eval"):
        write(model, path, images)
    assert not path.exists()


def test_wrong_weights_are_refused(net: nn.Module, images: Tensor, deploy: Deploy, tmp_path: Path) -> None:
    model, path = deploy(net), tmp_path / "m.onnx"
    values = model.layers["conv"].weight.values
    kept = values.clone()
    values += 0.3 * model.layers["conv"].weight.scale * (values != 0)
    with pytest.raises(ExportError, match=r"layer 'conv': its weight of shape \(16, 16, 3, 3\) is not on the grid"):
        write(model, path, images)
    values.copy_(kept)[3, :3, 0, 0] = model.layers["conv"].weight.scale
    with pytest.raises(ExportError, match=r"layer 'conv': 1 blocks of its weight .* break 2:4"):
        write(model, path, images)


def test_layer_that_is_not_in_the_graph_is_named(deploy: Deploy, tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.linear.weight * 2)

    with pytest.raises(ExportError, match="layer 'linear': no Conv, ConvTranspose, Gemm or MatMul reads its weight"):
        write(deploy(Outer()), tmp_path / "m.onnx", torch.randn(2, 8))


def test_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    class Hermite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.hermite_polynomial_h(x, 3)

    with pytest.raises(ExportError, match="hermite_polynomial_h"):
        write_onnx(Hermite().eval(), {}, tmp_path / "m.onnx", (torch.randn(2, 8),))


def test_model_of_one_batch_size_is_told_what_to_do(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 8) + x[:2]

    with pytest.raises(ExportError, match="give dynamic_batch=False"):
        write_onnx(Fixed().eval(), {}, tmp_path / "m.onnx", (torch.randn(2, 8),))
    write_onnx(Fixed().eval(), {}, tmp_path / "m.onnx", (torch.randn(2, 8),), dynamic_batch=False)
