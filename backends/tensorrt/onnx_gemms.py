"""The conv, Gemm and MatMul nodes of an ONNX file that multiply by a constant weight, as TensorRT looks at them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nmcompile.onnx_files import OnnxFile, constant_values

Array = npt.NDArray[np.generic]
NOTHING: Array = np.zeros((0, 0), np.int8)
TRANSPARENT = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})  # sparsity is seen through these
SHAPE_ONLY = frozenset({"Transpose", "Reshape", "Flatten", "Identity"})


@dataclass(frozen=True)
class OnnxGemm:
    """One node.

    Attributes:
        name: of the node.
        op: its operator.
        in_channels: of one group; 0 if the weight is hidden.
        out_channels: of the whole node; 0 if the weight is hidden.
        kernel: positions of a conv kernel; 1 for Gemm and MatMul.
        groups: of a conv.
        precision: what the product is computed in, such as "INT8" or "FLOAT16".
        hidden_by: the operator between the initializer and this node that hides the zeros, such as "Mul"; "" if none.
        violations: blocks of four along in-channels with more than two non-zeros.
    """

    name: str
    op: str
    in_channels: int
    out_channels: int
    kernel: int
    groups: int
    precision: str
    hidden_by: str
    violations: int


def onnx_gemms(model: OnnxFile) -> tuple[OnnxGemm, ...]:
    """Every such node of the main graph, in its order."""
    weights = _Weights(model)
    return tuple(gemm for node in model.proto.graph.node for gemm in weights.gemm(node))


class _Weights:
    def __init__(self, model: OnnxFile) -> None:
        graph = model.proto.graph
        self.folder = str(model.path.parent) if model.path else ""
        self.initializers: Mapping[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.producers: Mapping[str, NodeProto] = {name: node for node in graph.node for name in node.output}
        literals = (node.output[0] for node in graph.node if node.op_type == "Constant")
        self.constant = constant_values(graph, [*self.initializers, *literals])

    def gemm(self, node: NodeProto) -> Iterator[OnnxGemm]:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            return
        operand = 1 if node.input[1] in self.constant else 0
        if node.input[operand] not in self.constant:
            return  # a product of two activations
        weight, hidden_by = self.resolve(node.input[operand])
        rows = NOTHING if hidden_by or weight.ndim < 2 else _rows(node, weight, operand)
        yield OnnxGemm(
            name=node.name or node.output[0],
            op=node.op_type,
            in_channels=rows.shape[-1],
            out_channels=rows.shape[0],
            kernel=math.prod(rows.shape[1:-1]),
            groups=_attribute(node, "group", 1),
            precision=self.precision(node, operand, weight),
            hidden_by=hidden_by,
            violations=_violations(rows),
        )

    def resolve(self, name: str) -> tuple[Array, str]:
        """The initializer behind a constant, laid out as the node sees it, and the first operator that hides it."""
        chain: list[NodeProto] = []
        while name not in self.initializers and self.producers[name].op_type != "Constant":
            chain.insert(0, self.producers[name])
            name = chain[0].input[0]
        stored = self.initializers.get(name) or self.producers[name].attribute[0].t
        weight, hidden_by = numpy_helper.to_array(stored, self.folder), ""
        for node in chain:
            if node.op_type == "Transpose":
                order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
                weight = np.transpose(weight, order)
            elif node.op_type not in TRANSPARENT:
                hidden_by = hidden_by or node.op_type
        return weight, hidden_by

    def precision(self, node: NodeProto, operand: int, weight: Array) -> str:
        """The integers' type where both operands are quantized; else the type that the weight is dequantized to."""
        dequantize, other = (self.dequantize(node.input[i]) for i in (operand, 1 - operand))
        dtype = weight.dtype
        if dequantize is not None:
            scale, *zero_point = (self.resolve(name)[0].dtype for name in dequantize.input[1:])
            dtype = scale if other is None else (*zero_point, dtype)[0]
        return str(TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(dtype)))

    def dequantize(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that an operand comes from."""
        node = self.producers.get(name)
        while node is not None and node.op_type in SHAPE_ONLY:
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None


def _rows(node: NodeProto, weight: Array, operand: int) -> Array:
    """The weight as (out-channels, *kernel, in-channels)."""
    if node.op_type == "Conv":
        return np.moveaxis(weight, 1, -1)
    contraction_last = _attribute(node, "transB" if operand else "transA", 0) == operand
    rows = weight if contraction_last else np.swapaxes(weight, -1, -2)
    return rows.reshape(-1, rows.shape[-1])


def _violations(rows: Array) -> int:
    whole = rows.shape[-1] // 4 * 4
    blocks = rows[..., :whole].reshape(-1, 4)
    return int((np.count_nonzero(blocks, axis=1) > 2).sum())


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
