"""Exported files in ONNX Runtime against the same arithmetic in PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn.functional import conv2d

from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.errors import BackendUnavailable, FileError, LoweringError, OperandError


def weight_of(model: ModelProto) -> Tensor:
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if "integers" not in tensors:
        return torch.from_numpy(tensors["weight"].copy())
    return torch.from_numpy(tensors["integers"].astype(np.float32) * tensors["steps"][:, None, None, None])


def expected(model: ModelProto, x: Tensor) -> Tensor:
    """Compute the model's arithmetic in fp64, on a rounded input if the model quantizes it."""
    scale = next((float(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name == "scale"), None)
    x = x.double() if scale is None else (x.double() / scale).round().clamp(-128, 127) * scale
    return conv2d(x, weight_of(model).double(), padding=1).relu()


def product(first: list[Any], second: list[Any], out: list[Any]) -> bytes:
    """Make z = first @ second, both inputs."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", first), ("y", second))
    ]
    node = helper.make_node("MatMul", ["x", "y"], ["z"], name="product")
    graph = helper.make_graph([node], "graph", values, [helper.make_tensor_value_info("z", TensorProto.FLOAT, out)])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


@pytest.mark.parametrize("precision", ["FLOAT", "FLOAT16", "INT8"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_model_computes_what_it_says(conv_model: Callable[..., ModelProto], precision: str, batch: int) -> None:
    proto = conv_model(precision)
    model = OnnxRuntimeModel(proto.SerializeToString(), threads=1)
    x = torch.randn(batch, 8, 4, 4, generator=torch.Generator().manual_seed(0)).to(model.inputs[0].dtype)
    y = model(x)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, expected(proto, x).to(y.dtype))


def test_strided_and_tracked_inputs_are_taken(conv_model: Callable[..., ModelProto]) -> None:
    proto = conv_model()
    model = OnnxRuntimeModel(proto.SerializeToString(), threads=1)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = model(x=x)
    assert isinstance(y, Tensor) and not y.requires_grad
    torch.testing.assert_close(y, expected(proto, x.detach()).float())


@pytest.mark.parametrize("dtype", ["BOOL", "INT8", "UINT8", "INT32", "INT64", "FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"])
def test_every_dtype_passes_through_unchanged(dtype: str) -> None:
    """There are two outputs, one with a shape that is known only afterwards; neither shares memory with the input."""
    kind = getattr(TensorProto, dtype)
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Reshape", ["x", "shape"], ["z"])]
    x, y = (helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "xy")
    z = helper.make_tensor_value_info("z", kind, ["m"])
    graph = helper.make_graph(nodes, "graph", [x], [y, z], [helper.make_tensor("shape", TensorProto.INT64, [1], [-1])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = OnnxRuntimeModel(proto.SerializeToString(), threads=1)
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(model.inputs[0].dtype)
    results = model(tensor)
    tensor_before = tensor.clone()
    tensor.zero_()
    assert [result.dtype for result in results] == [tensor.dtype] * 2
    assert results[0].equal(tensor_before) and results[1].equal(tensor_before.flatten())


def test_results_outlive_the_model_and_later_calls(conv_model: Callable[..., ModelProto]) -> None:
    model = OnnxRuntimeModel(conv_model().SerializeToString(), threads=1)
    first = model(torch.ones(2, 8, 4, 4))
    assert isinstance(first, Tensor)
    kept = first.clone()
    model(torch.zeros(2, 8, 4, 4))
    del model
    assert first.equal(kept) and first.count_nonzero() > 0


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "'x' is missing"),
        ((torch.ones(1, 8, 4, 4),) * 2, {}, "2 inputs given; the model takes 1: x"),
        ((), {"image": torch.ones(1, 8, 4, 4)}, "no input 'image'"),
        ((torch.ones(1, 8, 4, 4),), {"x": torch.ones(1, 8, 4, 4)}, "given twice"),
        ((torch.ones(1, 7, 4, 4),), {}, r"expected torch.float32 \(batch, 8, 4, 4\) on cpu, got .* \(1, 7, 4, 4\)"),
        ((torch.ones(8, 4, 4),), {}, r"got torch.float32 \(8, 4, 4\)"),
        ((torch.ones(1, 8, 4, 4).double(),), {}, "got torch.float64"),
        ((torch.ones(1, 8, 4, 4, device="meta"),), {}, "on meta"),
        ((np.ones((1, 8, 4, 4), np.float32),), {}, "got a ndarray"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    conv_model: Callable[..., ModelProto], args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    model = OnnxRuntimeModel(conv_model().SerializeToString(), threads=1)
    with pytest.raises(OperandError, match=message):
        model(*args, **kwargs)


def test_a_named_dimension_is_the_same_in_all_inputs() -> None:
    model = OnnxRuntimeModel(product(["batch", 2, 3], ["batch", 3, 2], ["batch", 2, 2]), threads=1)
    x, y = torch.randn(4, 2, 3), torch.randn(4, 3, 2)
    torch.testing.assert_close(model(x, y), x @ y)
    with pytest.raises(OperandError, match=r"input 'y': expected torch.float32 \(4, 3, 2\)"):
        model(x, y[:3])


def test_a_failure_inside_the_model_is_an_error_of_ours() -> None:
    model = OnnxRuntimeModel(product(["a", "b"], ["c", "d"], ["a", "d"]), threads=1)
    with pytest.raises(LoweringError, match="product"):
        model(torch.ones(2, 3), torch.ones(4, 5))


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvidr"])
def test_a_missing_provider_is_no_silent_fallback(conv_model: Callable[..., ModelProto], provider: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so these providers may start")
    with pytest.raises(BackendUnavailable, match=provider):
        OnnxRuntimeModel(conv_model().SerializeToString(), providers=[provider, "CPUExecutionProvider"])


def test_no_provider_is_an_error(conv_model: Callable[..., ModelProto]) -> None:
    with pytest.raises(BackendUnavailable, match="CPUExecutionProvider"):
        OnnxRuntimeModel(conv_model().SerializeToString(), providers=())


def test_a_model_that_the_runtime_refuses_is_an_error_of_ours() -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="frob", domain="unknown")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("unknown", 1)]
    proto = helper.make_model(helper.make_graph([node], "graph", [x], [y]), opset_imports=domains, ir_version=8)
    with pytest.raises(FileError, match="Frobnicate"):
        OnnxRuntimeModel(proto.SerializeToString())


def test_a_hard_link_that_the_runtime_would_follow_is_refused(
    conv_model: Callable[..., ModelProto], tmp_path: Path
) -> None:
    proto = conv_model()
    tensor = proto.graph.initializer[0]
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    (tmp_path / "weights").hardlink_to(tmp_path / "secret")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(FileError, match="hard link"):
        OnnxRuntimeModel(tmp_path / "model.onnx")
    (tmp_path / "secret").unlink()
    assert OnnxRuntimeModel(tmp_path / "model.onnx", threads=1).inputs[0].name == "x"
