import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nmcompile.export import OnnxWeight, read_weights, weights_table
from nmcompile.pruning import NMPattern

Array = npt.NDArray[np.float32]
SPARSE = np.tile(np.array([1, 2, 0, 0], np.float32), (8, 4))  # (out, in) 2:4 along in


def read(nodes: list[onnx.NodeProto], constants: dict[str, npt.NDArray[np.generic]]) -> tuple[OnnxWeight, ...]:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(content, name) for name, content in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return read_weights(model.SerializeToString())


PATHS: dict[str, tuple[list[onnx.NodeProto], dict[str, npt.NDArray[np.generic]]]] = {
    "gemm": ([helper.make_node("Gemm", ["x", "w"], ["y"], "n")], {"w": SPARSE.T.copy()}),
    "gemm-transposed": ([helper.make_node("Gemm", ["x", "w"], ["y"], "n", transB=1)], {"w": SPARSE}),
    "matmul": ([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": SPARSE.T.copy()}),
    "matmul-three-dims": ([helper.make_node("MatMul", ["x", "w"], ["y"], "n")], {"w": SPARSE.T[None].copy()}),
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
    assert NMPattern(2, 4) in weight.patterns
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


def test_products_of_two_activations_are_no_layers() -> None:
    turn = helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0])
    assert read([turn, helper.make_node("MatMul", ["x", "t"], ["y"], "n")], {}) == ()


def test_rest_that_fills_no_block_counts_as_one() -> None:
    ragged = np.ones((2, 7), np.float32)
    ragged[:, :4] = [1, 1, 0, 0]
    [weight] = read([helper.make_node("Gemm", ["x", "w"], ["y"], "n", transB=1)], {"w": ragged})
    assert weight.violations(NMPattern(2, 4)) == 2
    assert weight.patterns == ()


def test_table_names_type_pattern_and_zeros() -> None:
    table = weights_table(read(*PATHS["quantized"]))
    assert table.splitlines()[2].split() == ["n", "MatMul", "8x16", "INT8", "2:4,", "4:8", "50%"]


def test_deep_graphs_are_read() -> None:
    """Thousands of nodes in a row, before an activation and behind a weight, are more than Python's stack holds."""
    before = [helper.make_node("Relu", [f"x{i}" if i else "x"], [f"x{i + 1}"]) for i in range(3000)]
    behind = [helper.make_node("Identity", [f"w{i}" if i else "w"], [f"w{i + 1}"]) for i in range(3000)]
    product = helper.make_node("MatMul", ["x3000", "x3000"], ["p"], "product of activations")
    (weight,) = read(
        [*before, product, *behind, helper.make_node("MatMul", ["p", "w3000"], ["y"], "n")], {"w": SPARSE.T.copy()}
    )
    assert weight.node == "n" and NMPattern(2, 4) in weight.patterns
