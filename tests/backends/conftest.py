"""Small ONNX models with 2:4 weights, a cuSPARSELt that PyTorch computes, and frozen layers that take shortcuts."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper
from torch import Tensor

from nmcompile.backends.cpu import packed_integers
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.ir.choice import Choice
from nmcompile.three_gemm.shortcut import Shortcut
from nmcompile.three_gemm.triple import GemmTriple
from nmcompile.weight_cache import WeightCache
from tests.backends.fake_cusparselt import FakeLibrary
from tests.backends.on_triton import interpreter

SCALE = 0.125  # step of the activations
STEP = 0.0625  # step of the weights


def sparse_integers(out_channels: int, channels: int) -> Any:
    """Return a weight of small integers, int8 (out, in, 3, 3), with the first two of every four in-channels kept."""
    weight = np.arange(out_channels * channels * 9).reshape(out_channels, channels, 3, 3) % 7 + 1
    weight[:, [c for c in range(channels) if c % 4 >= 2]] = 0
    return weight.astype(np.int8)


def conv_model(
    precision: str = "FLOAT", channels: int = 8, out_channels: int = 8, mask_node: bool = False
) -> ModelProto:
    """Make a 3x3 convolution and a ReLU, dynamic batch, 4x4 pixels; INT8 has Q/DQ on the input and DQ on the weight."""
    integers = sparse_integers(out_channels, channels)
    dtype = TensorProto.FLOAT16 if precision == "FLOAT16" else TensorProto.FLOAT
    numbers = np.float16 if precision == "FLOAT16" else np.float32
    tensors = {"weight": (integers * STEP).astype(numbers)}
    nodes: list[NodeProto] = []
    x, weight = "x", "weight"
    if precision == "INT8":
        tensors = {
            "integers": integers,
            "steps": np.full(out_channels, STEP, np.float32),
            "zeros": np.zeros(out_channels, np.int8),
            "scale": np.array(SCALE, np.float32),
            "zero": np.array(0, np.int8),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["integers", "steps", "zeros"], ["weight"], name="weight_dq", axis=0),
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_q"], name="x_q"),
            helper.make_node("DequantizeLinear", ["x_q", "scale", "zero"], ["x_dq"], name="x_dq"),
        ]
        x = "x_dq"
    if mask_node:
        tensors["mask"] = (integers != 0).astype(numbers)
        nodes.append(helper.make_node("Mul", [weight, "mask"], ["masked"], name="masking"))
        weight = "masked"
    nodes.append(helper.make_node("Conv", [x, weight], ["c"], name="conv", pads=[1, 1, 1, 1]))
    nodes.append(helper.make_node("Relu", ["c"], ["y"], name="relu"))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, ["batch", channels, 4, 4])],
        [helper.make_tensor_value_info("y", dtype, ["batch", out_channels, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model, full_check=True)
    return model


@pytest.fixture(name="conv_model")
def _conv_model() -> Callable[..., ModelProto]:
    return conv_model


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Return a library on CPU tensors, whose kernels run whatever they gain."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # by the library's own function operands are compressed
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    return FakeLibrary()


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Request Triton's interpreter for a test: Triton asks again at the first launch."""
    with interpreter():
        yield


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force every GEMM to the kernel that has a choice, and forget weights that were packed before."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    monkeypatch.setattr(packed_integers, "_kept", WeightCache())


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list with an entry for each layer that took its shortcut."""
    calls: list[str] = []
    run = Shortcut.run_unseen

    def counted(self: Shortcut, triple: GemmTriple, *operands: Tensor) -> Tensor | None:
        result = run(self, triple, *operands)
        calls.extend([triple.layer.name] * (result is not None))
        return result

    monkeypatch.setattr(Shortcut, "run_unseen", counted)
    return calls
