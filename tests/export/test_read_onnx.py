"""The table of a file's weights, and the patterns that it was written with."""

import numpy as np
import pytest
from onnx import ModelProto

from nmcompile.errors import FileError
from nmcompile.export import weights_table
from nmcompile.export.planned_patterns import PLANNED, planned_patterns
from nmcompile.files.open_onnx import OnnxFile
from nmcompile.files.read_weights import OnnxWeight, Rows
from nmcompile.pruning import NMPattern


def test_table_names_type_pattern_and_zeros() -> None:
    rows = np.tile(np.array([1, 2, 0, 0], np.int8), (8, 4))
    weight = OnnxWeight("n", "MatMul", "w", (8, 16), "INT8", Rows(rows), groups=1, precision="FLOAT", hidden_by="")
    table = weights_table((weight,))
    assert table.splitlines()[2].split() == ["n", "MatMul", "8x16", "INT8", "2:4,", "4:8", "50%"]


def planned(text: str) -> dict[str, NMPattern] | None:
    proto = ModelProto()
    proto.metadata_props.add(key=PLANNED, value=text)
    return planned_patterns(OnnxFile("m.onnx", proto, b"", None))


def test_planned_patterns_are_read() -> None:
    assert planned('{"conv": "2:4"}') == {"conv": NMPattern(2, 4)}
    assert planned("{}") == {}
    assert planned_patterns(OnnxFile("m.onnx", ModelProto(), b"", None)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"conv": 3}', '{"conv": "5:4"}', "[" * 10**5])
def test_metadata_of_no_writer_of_ours_is_refused(text: str) -> None:
    with pytest.raises(FileError, match=r"m\.onnx: its metadata"):
        planned(text)
