"""What an ONNX file multiplies by: its GEMM nodes and their constant weights, whoever wrote it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from tabulate import tabulate

from nmcompile.errors import FileError
from nmcompile.onnx_files import OnnxFile, constant_values, open_onnx
from nmcompile.pruning import NMPattern

Array = npt.NDArray[np.generic]
Perm = list[int] | None
PLANNED = "nmcompile.patterns"
"""The key of a file's metadata that says which node was written with which pattern, as JSON."""
GEMMS = frozenset({"Conv", "Gemm", "MatMul"})
SEEN_THROUGH = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})
PATTERNS = tuple(NMPattern.parse(text) for text in ("1:4", "2:4", "2:8", "4:8"))


@dataclass(frozen=True)
class OnnxWeight:
    """A GEMM node and its weight.

    Attributes:
        node: its name.
        op: Conv, Gemm or MatMul.
        initializer: the name of the stored weight; "" where it is hidden.
        shape: as stored.
        dtype: as stored, "INT8" for example.
        rows: the weight with in-channels last, `(..., in)`; empty where it is hidden.
        hidden_by: the operator that keeps runtimes from seeing the zeros, "Mul" for example; "" if none does.
    """

    node: str
    op: str
    initializer: str
    shape: tuple[int, ...]
    dtype: str
    rows: Array
    hidden_by: str

    @property
    def zeros(self) -> float:
        """The fraction of zeros."""
        return 1 - np.count_nonzero(self.rows) / self.rows.size if self.rows.size else 0.0

    @property
    def patterns(self) -> tuple[NMPattern, ...]:
        """The usual patterns that the weight obeys in whole blocks."""
        fitting = (pattern for pattern in PATTERNS if self.rows.size and self.rows.shape[-1] % pattern.block == 0)
        return tuple(pattern for pattern in fitting if not self.violations(pattern))

    def violations(self, pattern: NMPattern) -> int:
        """Blocks along in-channels with more than N non-zeros; a rest that fills no block counts as one."""
        rest = -self.rows.shape[-1] % pattern.block
        padded = np.pad(self.rows != 0, [(0, 0)] * (self.rows.ndim - 1) + [(0, rest)])
        return int((padded.reshape(-1, pattern.block).sum(axis=1) > pattern.n_keep).sum())


def read_weights(file: OnnxFile | str | os.PathLike[str] | bytes) -> tuple[OnnxWeight, ...]:
    """Every Conv, Gemm and MatMul of the main graph that multiplies by a constant, in its order.

    Raises:
        FileError: a damaged or hostile file.
    """
    opened = file if isinstance(file, OnnxFile) else open_onnx(file)
    return tuple(_weights(opened.proto.graph, str(opened.path.parent) if opened.path else ""))


def planned_patterns(file: OnnxFile) -> dict[str, NMPattern]:
    """Which pattern each node was written with; empty for files of other writers.

    Raises:
        FileError: metadata that no writer of ours has made.
    """
    text = next((entry.value for entry in file.proto.metadata_props if entry.key == PLANNED), "{}")
    try:
        return {str(name): NMPattern.parse(pattern) for name, pattern in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise FileError(f"{file.name}: its metadata {PLANNED!r} cannot be read ({error})") from error


def weights_table(weights: tuple[OnnxWeight, ...]) -> str:
    """The weights as text, a row each."""
    rows = [
        [
            w.node,
            w.op,
            "x".join(map(str, w.shape)),
            w.dtype,
            f"hidden by {w.hidden_by}" if w.hidden_by else ", ".join(map(str, w.patterns)) or "dense",
            f"{w.zeros:.0%}",
        ]
        for w in weights
    ]
    return tabulate(rows, headers=["node", "operator", "weight", "type", "pattern", "zeros"])


def _weights(graph: GraphProto, folder: str) -> Iterator[OnnxWeight]:
    constants = _Constants(graph)
    for node in graph.node:
        if node.op_type not in GEMMS or node.domain not in ("", "ai.onnx") or node.input[1] not in constants.values:
            continue
        tensor, perms, hidden_by = constants.stored(node.input[1])
        content = numpy_helper.to_array(tensor, folder)
        dtype = TensorProto.DataType.Name(tensor.data_type)
        rows = np.zeros((0, 0)) if hidden_by or content.ndim < 2 else _in_last(node, content, perms)
        yield OnnxWeight(node.name or node.output[0], node.op_type, tensor.name, content.shape, dtype, rows, hidden_by)


class _Constants:
    """What a graph computes from initializers alone."""

    def __init__(self, graph: GraphProto) -> None:
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.values = constant_values(graph, self.initializers)

    def stored(self, name: str) -> tuple[TensorProto, list[Perm], str]:
        """The initializer behind a constant, the transposes that follow it, and what hides it."""
        chain: list[NodeProto] = []
        while name not in self.initializers:
            chain.insert(0, self.producers[name])
            name = chain[0].input[0]
        perms = [_perm(node) for node in chain if node.op_type == "Transpose"]
        hiding = (node.op_type for node in chain if node.op_type not in {"Transpose", *SEEN_THROUGH})
        return self.initializers[name], perms, next(hiding, "")


def _perm(transpose: NodeProto) -> Perm:
    return next((list(attribute.ints) for attribute in transpose.attribute if attribute.name == "perm"), None)


def _in_last(node: NodeProto, weight: Array, perms: list[Perm]) -> Array:
    for perm in perms:
        weight = np.transpose(weight, perm)
    if node.op_type == "Conv":
        return np.moveaxis(weight, 1, -1)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return weight if attributes.get("transB") else np.swapaxes(weight, -1, -2)
