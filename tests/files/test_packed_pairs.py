"""2:4 integers packed in pairs: what NumPy, ONNX's evaluator and ONNX Runtime make of them."""

import itertools
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nmcompile.errors import FileError
from nmcompile.files.open_onnx import open_onnx
from nmcompile.files.packed_pairs import DOMAIN, OPERATOR, holds, pack, unpack, unpack_function, unpacks_pairs
from nmcompile.files.read_weights import read_weights

Integers = npt.NDArray[np.int8]


def two_of_four(shape: tuple[int, ...], seed: int, *, low: int = -8) -> Integers:
    """Return integers with none, one or two non-zeros in every block of four."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(low, 8, shape, np.int8).reshape(-1, 4)
    weight[rng.random(weight.shape).argsort(1).argsort(1) >= rng.integers(0, 3, (len(weight), 1))] = 0
    return weight.reshape(shape)


def packed_model(weight: Integers, function: onnx.FunctionProto | None = None) -> onnx.ModelProto:
    """Return y = x times the unpacked weight `(out, in)` transposed, with the weight itself as second output."""
    kept, triples = (numpy_helper.from_array(part, name) for part, name in zip(pack(weight), "kt", strict=True))
    nodes = [
        helper.make_node(OPERATOR, ["k", "t"], ["w"], domain=DOMAIN),
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"]),
        helper.make_node("Gemm", ["x", "f"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, weight.shape[1]])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weight.shape[0]]),
            helper.make_tensor_value_info("w", TensorProto.INT8, list(weight.shape)),
        ],
        [kept, triples, numpy_helper.from_array(np.array(1, np.float32), "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function or unpack_function(21)], ir_version=10)


def test_every_block_comes_back() -> None:
    """All blocks of one value in one place, and of two values that tell the places apart."""
    blocks = [np.zeros(4, np.int8)]
    for first, second in itertools.combinations(range(4), 2):
        for values in itertools.product(range(-8, 8), repeat=2):
            block = np.zeros(4, np.int8)
            block[[first, second]] = values
            blocks.append(block)
    weight = np.concatenate(blocks)[None]
    assert holds(weight)
    assert np.array_equal(unpack(*pack(weight)), weight)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 5), max_size=3), st.integers(1, 9))
def test_any_shape_comes_back(seed: int, outer: list[int], blocks: int) -> None:
    weight = two_of_four((*outer, 4 * blocks), seed)
    kept, triples = pack(weight)
    assert np.array_equal(unpack(kept, triples), weight)
    assert kept.nbytes + triples.nbytes < Fraction(weight.size, 3) + 1


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (5, 20), (7, 64)])
def test_the_function_computes_the_same_anywhere(shape: tuple[int, int]) -> None:
    weight = two_of_four(shape, 0)
    proto = packed_model(weight)
    onnx.checker.check_model(proto, full_check=True)
    x = np.arange(shape[1], dtype=np.float32)[None]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for y, w in (session.run(None, {"x": x}), ReferenceEvaluator(proto).run(None, {"x": x})):
        assert isinstance(w, np.ndarray) and w.dtype == np.int8
        assert np.array_equal(w, weight)
        assert np.array_equal(y, x @ weight.T.astype(np.float32))  # integers below 2**24 are exact


@pytest.mark.parametrize(
    "weight",
    [
        np.array([[1, 1, 1, 0]]),
        np.array([[8, 0, 0, 0]]),
        np.array([[-9, 0, 0, 0]]),
        np.zeros((2, 6)),
        np.zeros((0, 4)),
    ],
)
def test_other_weights_are_not_packed(weight: npt.NDArray[np.generic]) -> None:
    assert not holds(weight.astype(np.int8))


@pytest.mark.parametrize(
    ("kept", "triples"),
    [
        (np.zeros(4, np.uint8), np.zeros(1, np.uint8)),
        (np.zeros(3, np.uint8), np.full(1, 216, np.uint8)),
        (np.zeros(3, np.int8), np.zeros(1, np.uint8)),
        (np.zeros(3, np.uint8), np.zeros(1, np.float32)),
        (np.zeros((), np.uint8), np.zeros(1, np.uint8)),
    ],
)
def test_bytes_of_no_weight_are_refused(kept: npt.NDArray[np.generic], triples: npt.NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        unpack(kept, triples)


def test_readers_see_the_zeros() -> None:
    weight = two_of_four((8, 16), 1)
    (read,) = read_weights(open_onnx(packed_model(weight).SerializeToString()))
    assert np.array_equal(read.rows, weight)
    assert (read.shape, read.dtype, read.hidden_by) == ((8, 16), "INT4 pairs", "")


def test_a_function_that_only_has_the_name_is_not_trusted() -> None:
    function = unpack_function(21)
    assert unpacks_pairs([function])
    function.node[-1].op_type = "Expand"
    assert not unpacks_pairs([function])
    (read,) = read_weights(open_onnx(packed_model(two_of_four((8, 16), 1), function).SerializeToString()))
    assert read.hidden_by == f"{DOMAIN}.{OPERATOR}" and not read.rows.size


def test_another_table_is_not_trusted() -> None:
    function = unpack_function(21)
    table = numpy_helper.to_array(function.node[1].attribute[0].t).copy()
    table[300] = 1
    function.node[1].attribute[0].t.CopyFrom(numpy_helper.from_array(table))
    assert not unpacks_pairs([function])


def test_a_file_whose_pairs_are_cut_off_is_refused() -> None:
    proto = packed_model(two_of_four((8, 16), 1))
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(3, np.uint8), "t"))
    with pytest.raises(FileError, match="tensor 'k' cannot be read"):
        tuple(read_weights(open_onnx(proto.SerializeToString())))
