"""What a TensorRT build says, read from recorded text; no TensorRT is needed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from nmcompile.backends.tensorrt.engine_layers import EngineLayer, layers_from_json, layers_from_log
from nmcompile.backends.tensorrt.layer_report import EngineReport, explain
from nmcompile.backends.tensorrt.onnx_gemms import OnnxGemm, onnx_gemms
from nmcompile.backends.tensorrt.sidecar import Sidecar
from nmcompile.backends.tensorrt.sparsity_log import Listed, SparsityLog, parse_sparsity
from nmcompile.errors import FileError
from nmcompile.onnx_files import open_onnx

GEMM = OnnxGemm("conv", "Conv", 256, 256, 9, 1, "INT8", hidden_by="", violations=0)
SILENT = SparsityLog(None, None)
DENSE = EngineLayer("conv + relu", ("conv", "relu"), "sm80_xmma_fprop_implicit_gemm_dense_int8", ("Int8",))
SPARSE = replace(DENSE, tactic="sm80_xmma_fprop_sparse_conv_int8_sptensor")

NAMED = """[I] [TRT] (Sparsity) Layers eligible for sparse math: conv1 + relu1, conv2, fc
[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv1 + relu1"""
NONE_PICKED = """[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: conv1
[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers:
[TensorRT] INFO: Engine built"""
COUNTED = """(Sparsity) Found 3 layer(s) eligible to use sparse tactics
(Sparsity) Chose 1 layer(s) using sparse tactics"""
COUNTED_AND_NAMED = """(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv1 + relu1, conv2
(Sparsity) Chose 1 layer(s) using sparse tactics: conv2"""


def listed(*names: str) -> Listed:
    return Listed(len(names), frozenset(names))


@pytest.mark.parametrize(
    ("text", "eligible", "chosen"),
    [
        (NAMED, listed("conv1 + relu1", "conv2", "fc"), listed("conv1 + relu1")),
        (NONE_PICKED, listed("conv1"), listed()),
        (COUNTED, Listed(3, None), Listed(1, None)),
        (COUNTED_AND_NAMED, listed("conv1 + relu1", "conv2"), listed("conv2")),
        (NAMED + "\n" + COUNTED_AND_NAMED, listed("conv1 + relu1", "conv2"), listed("conv2")),
        ("Engine generation completed in 0.02 seconds.", None, None),
        ("", None, None),
    ],
)
def test_both_forms_of_the_log_are_read(text: str, eligible: Listed | None, chosen: Listed | None) -> None:
    assert parse_sparsity(text.splitlines()) == SparsityLog(eligible, chosen)


@pytest.mark.parametrize(
    ("layers", "name", "found"),
    [
        (listed("conv1 + relu1"), "relu1", True),
        (listed("conv10"), "conv1", False),
        (Listed(2, None), "conv1", None),
        (Listed(0, None), "conv1", False),
    ],
)
def test_a_fused_layer_holds_its_nodes(layers: Listed, name: str, found: bool | None) -> None:
    assert layers.has(name) is found


def test_detailed_layer_information_is_read() -> None:
    document = {
        "Layers": [
            {
                "Name": "conv1 + relu1",
                "LayerType": "CaskConvolution",
                "Outputs": [{"Name": "y", "Format/Datatype": "Channel major INT8 format where channel % 32 == 0"}],
                "HasSparseWeights": 1,
                "TacticName": "sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_sptensor",
                "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]",
            },
            {"Name": "fc_myl0_2", "Outputs": [{"Datatype": "Half"}], "TacticName": "__myelin_CASK_STUB"},
        ],
        "Bindings": ["x", "y"],
    }
    conv, linear = layers_from_json(json.dumps(document))
    assert (conv.nodes, conv.is_sparse) == (("conv1", "relu1"), True)
    assert conv.output_types == ("Channel major INT8 format where channel % 32 == 0",)
    assert (linear.tactic, linear.is_sparse, linear.output_types) == (None, None, ("Half",))


def test_layer_information_without_details_still_has_the_names() -> None:
    (layer,) = layers_from_json('{"Layers": ["conv1 + relu1"], "Bindings": []}')
    assert (layer.nodes, layer.is_sparse) == (("conv1", "relu1"), None)


@pytest.mark.parametrize("document", ["", "{", "[]", "{}", '{"Layers": 3}', '{"Layers": [3]}', "[" * 10**5])
def test_other_documents_are_refused(document: str) -> None:
    with pytest.raises(FileError, match="layer information"):
        layers_from_json(document)


def test_a_listing_in_the_log_is_read() -> None:
    row = (
        "Name: conv1_myl0_2, LayerType: correlation, Inputs: [ { Name: a, Dimensions: [-1,64,8,8], Datatype: Int8 }], "
        "Constants: [ { Name: w, Dimensions: [64,64,3,3], Datatype: Int8 }], Outputs: [ { Name: y, Dimensions: "
        "[-1,64,8,8], Strides: [4096,1,512,64], Datatype: Float, Format: (NHWC) Channel major format }, { Name: z, "
        "Dimensions: [1], Format/Datatype: Half }], TacticName: {}, StreamId: 0, Metadata: "
        "[ONNX Layer: conv1]\x1f[ONNX Layer: a[0]]\x1e[ONNX Layer: relu1]"
    )
    empty = "Name: shapes, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0"
    listing = "\n".join(
        ["Layers:", empty, row.replace("{}", "sm90_sparse_x"), "", "I/O Tensors:", " Name: x, IOMode: I"]
    )
    shapes, conv = layers_from_log(["Layers:\nName: of an earlier build", "other", listing, "more"])
    assert (shapes.name, shapes.tactic, shapes.output_types) == ("shapes", None, ())
    assert conv == EngineLayer("conv1_myl0_2", ("conv1", "a[0]", "relu1"), "sm90_sparse_x", ("Float", "Half"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_by": "Mul"}, "comes out of a Mul node"),
        ({"in_channels": 6}, "6 in-channels: no multiple of 4"),
        ({"in_channels": 1, "groups": 256}, "1 in-channels a group: no multiple of 4"),
        ({"violations": 3}, "not 2:4 along in-channels: 3 blocks"),
        ({"precision": "FLOAT"}, "computed in FLOAT"),
        ({"precision": "INT4"}, "computed in INT4"),
    ],
)
@pytest.mark.parametrize("layer", [None, DENSE])
def test_an_ineligible_layer_has_the_reason(change: dict[str, Any], reason: str, layer: EngineLayer | None) -> None:
    (row,) = explain([replace(GEMM, **change)], [layer] if layer else [], SILENT, sparse=True)
    assert (row.eligible, row.sparse) == (False, False)
    assert reason in row.reason


@pytest.mark.parametrize(
    ("change", "types", "reason"),
    [
        ({"in_channels": 272}, "Int8", "multiples of 32 and 32"),
        ({"precision": "FLOAT16", "out_channels": 260}, "Half", "multiples of 16 and 8"),
        ({}, "Half", "it writes Half"),
        ({"kernel": 1, "in_channels": 128}, "Int8", "128 by 256 is small"),
        ({"out_channels": 64}, "Int8", "2304 by 64 is small"),
        ({}, "Int8", "a dense tactic was timed as faster"),
        ({"precision": "FLOAT16"}, "Half", "a dense tactic was timed as faster"),
    ],
)
def test_an_eligible_dense_layer_has_the_likely_reason(change: dict[str, Any], types: str, reason: str) -> None:
    layer = replace(DENSE, output_types=(types,))
    (row,) = explain([replace(GEMM, **change)], [layer], SILENT, sparse=True)
    assert (row.eligible, row.sparse) == (True, False)
    assert reason in row.reason


@pytest.mark.parametrize("log", [SILENT, SparsityLog(listed("conv + relu"), listed("conv + relu"))])
def test_a_sparse_layer_needs_no_reason(log: SparsityLog) -> None:
    (row,) = explain([GEMM], [SPARSE], log, sparse=True)
    assert (row.eligible, row.sparse, row.tactic, row.reason) == (True, True, SPARSE.tactic, "")


def test_the_builder_has_the_last_word_on_what_was_chosen() -> None:
    (row,) = explain([GEMM], [], SparsityLog(listed("conv"), listed()), sparse=True)
    assert (row.eligible, row.sparse) == (True, False)
    (row,) = explain([GEMM], [], SparsityLog(listed("other"), listed()), sparse=True)
    assert (row.eligible, row.sparse) == (False, False)
    assert "did not find" in row.reason


def test_an_unknown_tactic_is_not_called_dense() -> None:
    (row,) = explain([GEMM], [replace(DENSE, tactic=None)], SILENT, sparse=True)
    assert (row.eligible, row.sparse) == (True, None)
    assert "known once the plan is loaded" in row.reason


def test_sparse_tactics_that_were_off_are_the_reason() -> None:
    (row,) = explain([GEMM], [DENSE], SILENT, sparse=False)
    assert (row.sparse, row.reason) == (False, "built with sparse=False")


def test_the_layer_and_not_its_epilogue_speaks_for_the_node() -> None:
    epilogue = EngineLayer("epilogue", ("conv", "relu"), "dense", ("Float",))
    (row,) = explain([GEMM], [epilogue, replace(SPARSE, name="conv_myl0_2")], SILENT, sparse=True)
    assert row.sparse is True


def test_a_report_is_a_table_and_json() -> None:
    sidecar = Sidecar("tensorrt", "11", None, True, {"x": [[1, 8], [2, 8], [4, 8]]}, 3, "ab", "cd")
    report = EngineReport(Path("m.plan"), sidecar, tuple(explain([GEMM], [SPARSE], SILENT, sparse=True)))
    assert json.loads(report.to_json())["layers"][0]["sparse"] is True
    assert "1 layers: 1 eligible for sparse tactics, 1 known to have one" in str(report)


@pytest.mark.parametrize("precision", ["FLOAT", "FLOAT16", "INT8"])
def test_a_convolution_is_found_with_its_precision(conv_model: Callable[..., ModelProto], precision: str) -> None:
    (gemm,) = onnx_gemms(open_onnx(conv_model(precision, channels=8, out_channels=12).SerializeToString()))
    assert gemm == OnnxGemm("conv", "Conv", 8, 12, 9, 1, precision, hidden_by="", violations=0)


def test_a_mask_in_the_graph_hides_the_zeros(conv_model: Callable[..., ModelProto]) -> None:
    (gemm,) = onnx_gemms(open_onnx(conv_model(mask_node=True).SerializeToString()))
    assert gemm.hidden_by == "Mul"


def test_blocks_that_are_too_full_are_counted(conv_model: Callable[..., ModelProto]) -> None:
    proto = conv_model("INT8")
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[3, 2, 0, 0] = weight[3, 7, 0, 0] = weight[5, 2, 1, 2] = 1
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "integers"))
    assert [gemm.violations for gemm in onnx_gemms(open_onnx(proto.SerializeToString()))] == [3]


LINEAR = np.zeros((6, 8), np.float32)  # (out, in)
LINEAR[:, ::4] = LINEAR[:, 1::4] = 1


def linear(nodes: list[NodeProto], weight: Any) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    x.type.tensor_type.shape.SetInParent()
    graph = helper.make_graph(nodes, "graph", [x], [helper.make_tensor_value_info("y", 1, [])])
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), "w"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("weight", "nodes"),
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
def test_the_contraction_of_a_linear_layer_is_found(weight: Any, nodes: list[NodeProto]) -> None:
    """The weight is 2:4 along in-features alone, so a wrong axis would count violations."""
    assert onnx_gemms(open_onnx(linear(nodes, weight))) == (
        OnnxGemm("fc", nodes[-1].op_type, 8, 6, 1, 1, "FLOAT", hidden_by="", violations=0),
    )


def test_a_product_of_activations_is_no_layer() -> None:
    assert onnx_gemms(open_onnx(linear([helper.make_node("MatMul", ["x", "x"], ["y"])], LINEAR))) == ()


def test_deep_graphs_are_read() -> None:
    """Thousands of nodes in a row, before an activation and behind a weight, are more than Python's stack holds."""
    before = [helper.make_node("Relu", [f"x{i}" if i else "x"], [f"x{i + 1}"]) for i in range(3000)]
    behind = [helper.make_node("Identity", [f"w{i}" if i else "w"], [f"w{i + 1}"]) for i in range(3000)]
    product = helper.make_node("MatMul", ["x3000", "x3000"], ["p"])
    nodes = [*before, product, *behind, helper.make_node("MatMul", ["p", "w3000"], ["y"], name="fc")]
    (gemm,) = onnx_gemms(open_onnx(linear(nodes, LINEAR.T)))
    assert (gemm.name, gemm.hidden_by, gemm.violations) == ("fc", "", 0)
