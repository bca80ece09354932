"""Constant weights read from ONNX files, also from files of other writers."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nmcompile.errors import FileError
from nmcompile.files.open_onnx import open_onnx
from nmcompile.files.read_weights import OnnxWeight, read_weights
from nmcompile.pruning import NMPattern
from tests.backends.conftest import conv_model

Array = npt.NDArray[np.generic]
Nodes = list[onnx.NodeProto]
TWO_OF_FOUR = NMPattern(2, 4)
SPARSE = np.tile(np.array([1, 2, 0, 0], np.float32), (8, 4))  # (out, in) 2:4 along in


def model(nodes: Nodes, tensors: list[TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("other", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def read(nodes: Nodes, constants: dict[str, Array]) -> tuple[OnnxWeight, ...]:
    tensors = [numpy_helper.from_array(np.ascontiguousarray(content), name) for name, content in constants.items()]
    return tuple(read_weights(open_onnx(model(nodes, tensors).SerializeToString())))


def facts(weight: OnnxWeight) -> tuple[Any, ...]:
    channels = weight.in_channels, weight.out_channels, weight.kernel, weight.groups
    return weight.node, weight.op, *channels, weight.precision, weight.hidden_by, weight.violations(TWO_OF_FOUR)


PATHS: dict[str, tuple[Nodes, dict[str, Array]]] = {
    "gemm": ([helper.make_node("Gemm", ["x", "w"], ["y"], "n")], {"w": SPARSE.T}),
    "gemm-transposed": ([helper.make_node("Gemm", ["x", "w"], ["y"], "n", transB=1)], {"w": SPARSE}),
    "matmul": ([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": SPARSE.T}),
    "matmul-three-dims": ([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": SPARSE.T[None]}),
    "transpose": (
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"], "n"),
        ],
        {"w": SPARSE},
    ),
    "quantized": (
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"]),
            helper.make_node("Transpose", ["f"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"], "n"),
        ],
        {"w": SPARSE.astype(np.int8), "s": np.array(0.5, np.float32), "z": np.array(0, np.int8)},
    ),
    "quantized-floats": (
        [
            helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["f"]),
            helper.make_node("Gemm", ["x", "f"], ["y"], "n", transB=1),
        ],
        {"w": SPARSE, "s": np.array(0.5, np.float32), "z": np.array(0, np.int8)},
    ),
    "conv": ([helper.make_node("Conv", ["x", "w"], ["y"], "n")], {"w": np.tile(SPARSE[:, :, None, None], (3, 3))}),
}


@pytest.mark.parametrize("path", PATHS)
def test_zeros_are_seen_along_in_channels(path: str) -> None:
    [weight] = read(*PATHS[path])
    assert weight.node == "n"
    assert weight.hidden_by == ""
    assert weight.zeros == 0.5
    assert TWO_OF_FOUR in weight.patterns
    assert weight.violations(NMPattern(1, 4)) == SPARSE.size // 4 * (9 if path == "conv" else 1)
    assert NMPattern(1, 4) not in weight.patterns


@pytest.mark.parametrize("op_type", ["Mul", "Reshape", "Concat"])
def test_zeros_behind_other_operators_are_hidden(op_type: str) -> None:
    second = {"Mul": SPARSE, "Reshape": np.array([8, 16]), "Concat": SPARSE}[op_type]
    hide = helper.make_node(op_type, ["w", "m"], ["h"])
    if op_type == "Concat":
        hide.attribute.append(helper.make_attribute("axis", 0))
    [weight] = read([hide, helper.make_node("Gemm", ["x", "h"], ["y"], "n", transB=1)], {"w": SPARSE, "m": second})
    assert weight.hidden_by == op_type
    assert weight.patterns == ()


@pytest.mark.parametrize("precision", ["FLOAT", "FLOAT16", "INT8"])
def test_a_convolution_is_found_with_its_precision(precision: str) -> None:
    (weight,) = read_weights(open_onnx(conv_model(precision, channels=8, out_channels=12).SerializeToString()))
    assert facts(weight) == ("conv", "Conv", 8, 12, 9, 1, precision, "", 0)


def test_a_mask_in_the_graph_hides_the_zeros() -> None:
    (weight,) = read_weights(open_onnx(conv_model(mask_node=True).SerializeToString()))
    assert weight.hidden_by == "Mul"


def test_blocks_that_are_too_full_are_counted() -> None:
    proto = conv_model("INT8")
    content = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    content[3, 2, 0, 0] = content[3, 7, 0, 0] = content[5, 2, 1, 2] = 1
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(content, "integers"))
    (weight,) = read_weights(open_onnx(proto.SerializeToString()))
    assert weight.violations(TWO_OF_FOUR) == 3


def test_a_group_of_channels_is_counted_alone() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=2)
    (weight,) = read([node], {"w": SPARSE[:, :, None]})
    assert facts(weight) == ("n", "Conv", 16, 8, 1, 2, "FLOAT", "", 0)


LINEAR = np.zeros((6, 8), np.float32)  # (out, in)
LINEAR[:, ::4] = LINEAR[:, 1::4] = 1


@pytest.mark.parametrize(
    ("content", "nodes"),
    [
        (LINEAR.T, [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]),
        (LINEAR, [helper.make_node("MatMul", ["w", "x"], ["y"], name="fc")]),
        (LINEAR.T, [helper.make_node("Gemm", ["x", "w"], ["y"], name="fc")]),
        (LINEAR, [helper.make_node("Gemm", ["x", "w"], ["y"], name="fc", transB=1)]),
        (LINEAR, [helper.make_node("Gemm", ["w", "x"], ["y"], name="fc")]),
        (LINEAR.T, [helper.make_node("Gemm", ["w", "x"], ["y"], name="fc", transA=1)]),
        (
            LINEAR,
            [
                helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
                helper.make_node("MatMul", ["x", "t"], ["y"], name="fc"),
            ],
        ),
    ],
)
def test_the_contraction_of_a_linear_layer_is_found(content: Array, nodes: Nodes) -> None:
    """The weight is 2:4 along in-features only, so a wrong axis would count violations."""
    (weight,) = read(nodes, {"w": content})
    assert facts(weight) == ("fc", nodes[-1].op_type, 8, 6, 1, 1, "FLOAT", "", 0)


def test_transposes_follow_each_other() -> None:
    """Three cyclic shifts of three axes are the identity; two are the inverse of one."""
    turns = [helper.make_node("Transpose", [a], [b], perm=[1, 2, 0]) for a, b in ("wa", "ab")]
    content = LINEAR[None].transpose(1, 2, 0)  # back to (1, out, in) by two shifts
    (weight,) = read([*turns, helper.make_node("MatMul", ["b", "x"], ["y"], name="fc")], {"w": content})
    assert facts(weight) == ("fc", "MatMul", 8, 6, 1, 1, "FLOAT", "", 0)
    assert np.array_equal(weight.rows, LINEAR)


def test_weights_of_constant_nodes_are_read() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(LINEAR.T))
    (weight,) = read([constant, helper.make_node("MatMul", ["x", "c"], ["y"], name="fc")], {})
    assert facts(weight) == ("fc", "MatMul", 8, 6, 1, 1, "FLOAT", "", 0)


def test_a_literal_shape_hides_no_layer() -> None:
    nodes = [
        helper.make_node("Constant", [], ["s"], value_ints=[16, 8]),
        helper.make_node("Reshape", ["w", "s"], ["r"]),
        helper.make_node("MatMul", ["x", "r"], ["y"], name="fc"),
    ]
    (weight,) = read(nodes, {"w": SPARSE})
    assert weight.hidden_by == "Reshape"


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("MatMul", ["x", "x"], ["y"])],
        [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"], "n")],
    ],
)
def test_products_of_two_activations_are_no_layers(nodes: Nodes) -> None:
    assert read(nodes, {"w": LINEAR}) == ()


def test_operators_of_other_domains_are_not_taken_for_onnx() -> None:
    """This holds even if they have ONNX names: model-local functions and custom operators may do anything."""
    foreign = helper.make_node("Identity", ["", "w"], ["t"], domain="other")
    product = helper.make_node("MatMul", ["t"], ["p"], domain="other")
    (weight,) = read([foreign, product, helper.make_node("MatMul", ["x", "t"], ["y"], name="fc")], {"w": LINEAR.T})
    assert (weight.node, weight.hidden_by) == ("fc", "other.Identity")


def test_weights_in_a_file_beside_the_model_are_read(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.ascontiguousarray(LINEAR.T), "w")]
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], tensors)
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (weight,) = read_weights(open_onnx(tmp_path / "m.onnx"))
    assert np.array_equal(weight.rows, LINEAR)


@pytest.mark.parametrize("perm", [[0, 0], [2, 1], [1], [1, 0, 2]])
def test_an_impossible_transpose_hides_the_weight(perm: list[int]) -> None:
    turn = helper.make_node("Transpose", ["w"], ["t"], perm=perm)
    (weight,) = read([turn, helper.make_node("MatMul", ["x", "t"], ["y"], "n")], {"w": SPARSE})
    assert weight.hidden_by == "Transpose" and not weight.rows.size


def test_a_weight_of_more_elements_than_declared_is_refused() -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], np.ones(4))
    tensor.float_data.append(1)
    opened = open_onnx(model([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], [tensor]).SerializeToString())
    with pytest.raises(FileError, match="tensor 'w' cannot be read"):
        tuple(read_weights(opened))


@pytest.mark.parametrize("content", [np.zeros((0, 4), np.float32), np.zeros(4, np.float32), np.float32(1)])
def test_weights_without_rows_are_listed(content: Array) -> None:
    (weight,) = read([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": content})
    assert (weight.zeros, weight.patterns, weight.violations(TWO_OF_FOUR)) == (0.0, (), 0)


def test_rest_that_fills_no_block_counts_as_one() -> None:
    ragged = np.ones((2, 7), np.float32)
    ragged[:, :4] = [1, 1, 0, 0]
    [weight] = read([helper.make_node("Gemm", ["x", "w"], ["y"], "n", transB=1)], {"w": ragged})
    assert weight.violations(TWO_OF_FOUR) == 2
    assert weight.patterns == ()


def test_deep_graphs_are_read() -> None:
    """Thousands of nodes in a row, before an activation and after a weight, exceed Python's stack."""
    before = [helper.make_node("Relu", [f"x{i}" if i else "x"], [f"x{i + 1}"]) for i in range(3000)]
    behind = [helper.make_node("Identity", [f"w{i}" if i else "w"], [f"w{i + 1}"]) for i in range(3000)]
    product = helper.make_node("MatMul", ["x3000", "x3000"], ["p"], "product of activations")
    layer = helper.make_node("MatMul", ["p", "w3000"], ["y"], "n")
    (weight,) = read([*before, product, *behind, layer], {"w": SPARSE.T})
    assert (weight.node, weight.hidden_by, weight.violations(TWO_OF_FOUR)) == ("n", "", 0)
    assert TWO_OF_FOUR in weight.patterns


MEGABYTE = 2**20


def peak(run: Callable[[], object]) -> int:
    """Return the most bytes in use at one time among those allocated since the start."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def large(seed: int = 0) -> Array:
    """Return a megabyte that is 2:4 along both axes."""
    content = np.random.default_rng(seed).random((512, 512), np.float32) + 1
    content[(np.add.outer(np.arange(512), np.arange(512)) % 4) > 1] = 0
    return content


def test_an_initializer_is_one_array_however_many_nodes_read_it() -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], [f"y{i}" if i else "y"], f"n{i}", transB=i % 2) for i in range(600)]
    opened = open_onnx(model(nodes, [numpy_helper.from_array(large(), "w")]).SerializeToString())
    weights: list[OnnxWeight] = []
    assert peak(lambda: weights.extend(read_weights(opened))) < 6 * MEGABYTE
    assert len(weights) == 600
    assert all(np.shares_memory(weights[0].rows, weight.rows) for weight in weights)
    assert np.array_equal(weights[0].rows, large().T) and np.array_equal(weights[1].rows, large())
    assert {weight.violations(TWO_OF_FOUR) for weight in weights} == {0}
    assert {weight.violations(NMPattern(1, 4)) for weight in weights} == {512 * 128}


def test_blocks_are_counted_once_for_all_nodes_that_read_a_weight_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, ...]] = []
    split = np.split

    def seen(x: Array, *args: Any, **kwargs: Any) -> list[Array]:
        counted.append(x.shape)
        return split(x, *args, **kwargs)

    monkeypatch.setattr(np, "split", seen)
    nodes = [helper.make_node("MatMul", ["x", f"w{i % 2}"], [f"y{i}" if i else "y"], f"n{i}") for i in range(40)]
    tensors = [numpy_helper.from_array(content, f"w{i}") for i, content in enumerate((large()[:8], large()[:16]))]
    opened = open_onnx(model(nodes, tensors).SerializeToString())
    assert [weight.violations(TWO_OF_FOUR) for weight in read_weights(opened)] == [0] * 40
    assert counted == [(512, 8), (512, 16)]


@pytest.mark.parametrize("beside", [True, False])
def test_one_weight_is_in_memory_at_a_time(tmp_path: Path, beside: bool) -> None:
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}" if i else "y"], f"n{i}") for i in range(12)]
    proto = model(nodes, [numpy_helper.from_array(large(i), f"w{i}") for i in range(12)])
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=beside, location="m.data", size_threshold=0)
    opened = open_onnx(path)
    found: list[int] = []
    used = peak(lambda: found.extend(weight.violations(TWO_OF_FOUR) for weight in read_weights(opened)))
    assert found == [0] * 12
    assert used < 6 * MEGABYTE
    assert opened.proto.ByteSize() < MEGABYTE if beside else opened.proto.ByteSize() > 12 * MEGABYTE
