from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from nmcompile.errors import ExportError, FileError
from nmcompile.export import Example, OnnxReport, verify_onnx, write_onnx
from nmcompile.export.check.compare_layers import ROUNDING, LayerCheck


def damage(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    proto = onnx.load(path)
    [tensor] = [t for t in proto.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor).copy())), name))
    onnx.save(proto, path)


def some_integers_off(weight: Any) -> Any:
    kept = np.flatnonzero(weight)[::16]
    weight.reshape(-1)[kept] += np.where(weight.reshape(-1)[kept] > 0, 1, -1).astype(np.int8)
    return weight


@pytest.fixture
def written(net: nn.Module, images: Tensor, deploy: Callable[..., Any], tmp_path: Path) -> tuple[Any, OnnxReport]:
    model = deploy(net)
    return model, write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,))


@pytest.mark.parametrize(
    ("initializer", "change", "message"),
    [
        (
            "conv.weight_quantized",
            some_integers_off,
            "layer 'conv' does not compute the same .* quantization steps apart",
        ),
        ("token.weight_scale", lambda scale: scale * np.float32(1.5), "layer 'token' does not compute the same"),
        ("stem.input_scale", lambda scale: scale * np.float32(1.1), "layer 'stem' does not compute the same"),
        ("stem.input_high", lambda high: high - np.uint8(4), "layer 'stem' does not compute the same"),
        ("head.weight_quantized", np.ones_like, "layer 'head': .* blocks of 'head.weight_quantized' break 2:4"),
    ],
)
def test_first_layer_that_differs_is_named(
    written: tuple[Any, OnnxReport], images: Tensor, initializer: str, change: Callable[[Any], Any], message: str
) -> None:
    model, report = written
    damage(report.path, initializer, change)
    with pytest.raises(ExportError, match=message):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_difference_between_layers_is_named_after_the_next_one(written: tuple[Any, OnnxReport], images: Tensor) -> None:
    model, report = written
    proto = onnx.load(report.path)
    [relu] = [node for node in proto.graph.node if node.output[0] == "relu_2"]
    relu.op_type = "Abs"
    onnx.save(proto, report.path)
    with pytest.raises(ExportError, match="layer 'token' reads other values in the file than in torch: up to"):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_difference_behind_the_last_layer_is_found_end_to_end(written: tuple[Any, OnnxReport], images: Tensor) -> None:
    model, report = written
    proto = onnx.load(report.path)
    last = next(node for node in proto.graph.node if node.output[0] == proto.graph.output[0].name)
    proto.graph.node.append(onnx.helper.make_node("Abs", ["signed"], [last.output[0]]))
    last.output[0] = "signed"
    onnx.save(proto, report.path)
    with pytest.raises(ExportError, match="ONNX Runtime does not compute the same as torch: relative L2"):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_a_channel_that_all_but_vanishes_hides_no_damage_to_others(
    net: Any, images: Tensor, deploy: Callable[..., Any], tmp_path: Path
) -> None:
    with torch.no_grad():
        net.norm2.weight[1], net.norm2.bias[1] = 1e-9, 1.0  # its step is tiny, its results are not
    model = deploy(net)
    report = write_onnx(model.plain, model.layers, tmp_path / "m.onnx", (images,))
    verify_onnx(report, model.layers, model.reference, [Example((images,))])
    damage(report.path, "conv.weight_quantized", some_integers_off)
    with pytest.raises(ExportError, match="layer 'conv' does not compute the same"):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_outputs_that_the_model_does_not_have_are_refused(written: tuple[Any, OnnxReport], images: Tensor) -> None:
    model, report = written
    proto = onnx.load(report.path)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("relu_2", TensorProto.FLOAT, [None] * 4))
    onnx.save(proto, report.path)
    with pytest.raises(ExportError, match="the file has 2 outputs, the model 1 tensors"):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_outputs_that_are_not_numbers_never_pass(written: tuple[Any, OnnxReport], images: Tensor) -> None:
    model, report = written
    damage(report.path, "head.bias", lambda bias: bias * np.float32("nan"))
    with pytest.raises(ExportError, match="layer 'head'"):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_truncated_file_is_refused(written: tuple[Any, OnnxReport], images: Tensor) -> None:
    model, report = written
    report.path.write_bytes(report.path.read_bytes()[:-100])
    with pytest.raises(FileError):
        verify_onnx(report, model.layers, model.reference, [Example((images,))])


def test_types_are_as_reported(written: tuple[Any, OnnxReport]) -> None:
    _, report = written
    kinds = {t.name: t.data_type for t in onnx.load(report.path).graph.initializer}
    assert all(kinds[f"{node.name}.weight_quantized"] == TensorProto.INT8 for node in report.nodes)


@pytest.mark.parametrize(
    ("outputs", "differing", "steps", "ok"),
    [(640, 1, 1.0, True), (640, 2, 1.0, False), (640, 1, 1.5, False), (8000, 8, 1.0, True), (8000, 9, 1.0, False)],
)
def test_one_of_a_thousand_outputs_may_differ_by_one_step(outputs: int, differing: int, steps: float, ok: bool) -> None:
    check = LayerCheck("layer", steps, 1 - differing / outputs, True, outputs)
    assert check.ok == ok


def test_long_float_sums_may_differ_by_their_rounding() -> None:
    assert LayerCheck("layer", 1.4, 1.0, True, 8000, rounding=0.5).ok
    assert not LayerCheck("layer", 1.4, 1.0, True, 8000, rounding=0.3).ok


@pytest.mark.parametrize(("length", "largest"), [(9, 127), (4608, 127), (65536, 100_000)])
def test_rounding_covers_float32_sums_but_is_no_free_pass(length: int, largest: int) -> None:
    x = torch.randn(200, length, generator=torch.Generator().manual_seed(0))
    exact = x.double().sum(1)
    step = float(exact.abs().max()) / largest
    in_turn = torch.from_numpy(x.numpy().cumsum(1)[:, -1])  # torch would add in float64
    found = float((in_turn.double() - exact).abs().max()) / step
    allowed = ROUNDING * length**0.5 * largest
    assert found < allowed < 10 * found
