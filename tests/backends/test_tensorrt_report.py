"""Reports of TensorRT builds, read from recorded text; TensorRT is not needed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nmcompile.backends.tensorrt.engine_layers import EngineLayer, layers_from_json, layers_from_log
from nmcompile.backends.tensorrt.layer_report import EngineReport, explain
from nmcompile.backends.tensorrt.sidecar import Sidecar
from nmcompile.backends.tensorrt.sparsity_log import Listed, SparsityLog, parse_sparsity
from nmcompile.errors import FileError
from nmcompile.files.read_weights import OnnxWeight, Rows


def weight(
    in_channels: int = 256, out_channels: int = 256, kernel: int = 9, violations: int = 0, **fields: Any
) -> OnnxWeight:
    """Return an INT8 convolution "conv", dense if `violations` says so."""
    rows = np.zeros((out_channels, kernel, in_channels), np.int8)
    rows[:violations, 0, :3] = 1
    shape = (out_channels, in_channels, kernel)
    return replace(OnnxWeight("conv", "Conv", "w", shape, "INT8", Rows(rows), 1, "INT8", hidden_by=""), **fields)


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
        ({"in_channels": 6}, "6 in-channels: not a multiple of 4"),
        ({"in_channels": 1, "groups": 256}, "1 in-channels a group: not a multiple of 4"),
        ({"violations": 3}, "not 2:4 along in-channels: 3 blocks"),
        ({"precision": "FLOAT"}, "computed in FLOAT"),
        ({"precision": "INT4"}, "computed in INT4"),
    ],
)
@pytest.mark.parametrize("layer", [None, DENSE])
def test_an_ineligible_layer_has_the_reason(change: dict[str, Any], reason: str, layer: EngineLayer | None) -> None:
    (row,) = explain([weight(**change)], [layer] if layer else [], SILENT, sparse=True)
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
    (row,) = explain([weight(**change)], [layer], SILENT, sparse=True)
    assert (row.eligible, row.sparse) == (True, False)
    assert reason in row.reason


@pytest.mark.parametrize("log", [SILENT, SparsityLog(listed("conv + relu"), listed("conv + relu"))])
def test_a_sparse_layer_needs_no_reason(log: SparsityLog) -> None:
    (row,) = explain([weight()], [SPARSE], log, sparse=True)
    assert (row.eligible, row.sparse, row.tactic, row.reason) == (True, True, SPARSE.tactic, "")


def test_the_builder_has_the_last_word_on_what_was_chosen() -> None:
    (row,) = explain([weight()], [], SparsityLog(listed("conv"), listed()), sparse=True)
    assert (row.eligible, row.sparse) == (True, False)
    (row,) = explain([weight()], [], SparsityLog(listed("other"), listed()), sparse=True)
    assert (row.eligible, row.sparse) == (False, False)
    assert "did not find" in row.reason


def test_an_unknown_tactic_is_not_called_dense() -> None:
    (row,) = explain([weight()], [replace(DENSE, tactic=None)], SILENT, sparse=True)
    assert (row.eligible, row.sparse) == (True, None)
    assert "known once the plan is loaded" in row.reason


def test_sparse_tactics_that_were_off_are_the_reason() -> None:
    (row,) = explain([weight()], [DENSE], SILENT, sparse=False)
    assert (row.sparse, row.reason) == (False, "built with sparse=False")


def test_the_layer_and_not_its_epilogue_speaks_for_the_node() -> None:
    epilogue = EngineLayer("epilogue", ("conv", "relu"), "dense", ("Float",))
    (row,) = explain([weight()], [epilogue, replace(SPARSE, name="conv_myl0_2")], SILENT, sparse=True)
    assert row.sparse is True


def test_a_report_is_a_table_and_json() -> None:
    sidecar = Sidecar("tensorrt", "11", None, True, {"x": [[1, 8], [2, 8], [4, 8]]}, 3, "ab", "cd")
    report = EngineReport(Path("m.plan"), sidecar, tuple(explain([weight()], [SPARSE], SILENT, sparse=True)))
    assert json.loads(report.to_json())["layers"][0]["sparse"] is True
    assert "1 layers: 1 eligible for sparse tactics, 1 known to have one" in str(report)
