"""The constant weights that an ONNX file multiplies by, as its runtimes see them, whoever wrote it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, NodeProto, TensorProto

from nmcompile.files.open_onnx import OnnxFile, read_tensor
from nmcompile.pruning import NMPattern

Array = npt.NDArray[np.generic]
NOTHING: Array = np.zeros((0, 0), np.int8)
WEIGHT_OPERANDS = {"Conv": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
TRANSPARENT = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})  # sparsity is seen through these
SHAPE_ONLY = frozenset({"Transpose", "Reshape", "Flatten", "Identity"})
PATTERNS = tuple(NMPattern.parse(text) for text in ("1:4", "2:4", "2:8", "4:8"))

_Layout = tuple[int, tuple[int, ...], int]
"""How a tensor is read: its identity, its axes in their order, and the one that is summed over."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight as (out-channels, *kernel, in-channels of one group), which all nodes that read it so share.

    Attributes:
        values: its elements.
        counts: results of counting, by pattern and for non-zeros; these are remembered after the values are gone.
    """

    values: Array
    counts: dict[NMPattern | None, int] = field(default_factory=dict)

    def nonzeros(self) -> int:
        """Count the elements that are not zero."""
        if None not in self.counts:
            self.counts[None] = int(np.count_nonzero(self.values))
        return self.counts[None]

    def violations(self, pattern: NMPattern) -> int:
        """Count the blocks along in-channels with more than N non-zeros; a rest that fills no block counts as one."""
        if pattern not in self.counts:
            whole = self.values.shape[-1] // pattern.block * pattern.block
            blocks, rest = np.split(self.values != 0, [whole], axis=-1)
            parts = blocks.reshape(-1, pattern.block).sum(axis=-1), rest.sum(axis=-1)
            self.counts[pattern] = sum(int((kept > pattern.n_keep).sum()) for kept in parts)
        return self.counts[pattern]


@dataclass(frozen=True)
class OnnxWeight:
    """A GEMM node and its weight.

    Attributes:
        node: its name.
        op: Conv, Gemm or MatMul.
        initializer: the name of the stored weight.
        shape: as stored.
        dtype: as stored, "INT8" for example.
        content: the weight itself; empty where it is hidden.
        groups: of a convolution.
        precision: what the product is computed in, "INT8" or "FLOAT16" for example.
        hidden_by: the operator that keeps runtimes from seeing the zeros, "Mul" for example; "" if none does.
    """

    node: str
    op: str
    initializer: str
    shape: tuple[int, ...]
    dtype: str
    content: Rows
    groups: int
    precision: str
    hidden_by: str

    @property
    def rows(self) -> Array:
        """The weight as (out-channels, *kernel, in-channels of one group)."""
        return self.content.values

    @property
    def out_channels(self) -> int:
        return int(self.rows.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.rows.shape[-1])

    @property
    def kernel(self) -> int:
        """Positions of a convolution's kernel; 1 for Gemm and MatMul."""
        return math.prod(self.rows.shape[1:-1])

    @property
    def zeros(self) -> float:
        """The fraction of zeros."""
        return 1 - self.content.nonzeros() / self.rows.size if self.rows.size else 0.0

    @property
    def patterns(self) -> tuple[NMPattern, ...]:
        """The usual patterns that the weight obeys in whole blocks."""
        fitting = (pattern for pattern in PATTERNS if self.rows.size and self.in_channels % pattern.block == 0)
        return tuple(pattern for pattern in fitting if not self.violations(pattern))

    def violations(self, pattern: NMPattern) -> int:
        """Count the blocks along in-channels with more than N non-zeros."""
        return self.content.violations(pattern)


def read_weights(file: OnnxFile) -> Iterator[OnnxWeight]:
    """Yield every Conv, Gemm and MatMul of the main graph that multiplies by a constant, in its order.

    One weight is in memory at a time if the caller keeps none, and one array for all nodes that read the same.

    Raises:
        FileError: a weight that holds another number of elements than it declares.
    """
    yield from _Reader(file).weights()


@dataclass(frozen=True)
class _Constant:
    """A value that a graph computes from stored tensors alone: the first of them, and what it went through."""

    tensor: TensorProto
    axes: tuple[int, ...]  # of the tensor, in their order now
    hidden_by: str = ""

    @property
    def dtype(self) -> str:
        return str(TensorProto.DataType.Name(self.tensor.data_type))

    def behind(self, node: NodeProto) -> "_Constant":
        """What the node makes of it."""
        operator = _operator(node)
        if self.hidden_by or operator in TRANSPARENT:
            return self
        order = tuple(_attribute(node, "perm").ints) or tuple(reversed(range(len(self.axes))))
        if operator == "Transpose" and sorted(order) == sorted(self.axes):
            return replace(self, axes=tuple(self.axes[axis] for axis in order))
        return replace(self, hidden_by=operator)


class _Reader:
    """Passes the nodes in their order, which is topological: graphs are deeper than Python's stack."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.constants = {tensor.name: _stored(tensor) for tensor in file.proto.graph.initializer}
        self.dequantize: dict[str, NodeProto] = {}  # the DequantizeLinear that a value comes from
        self.arrays: WeakValueDictionary[int, Array] = WeakValueDictionary()  # by the identity of a tensor
        self.rows: WeakValueDictionary[_Layout, Rows] = WeakValueDictionary()
        self.counts: dict[_Layout, dict[NMPattern | None, int]] = {}

    def weights(self) -> Iterator[OnnxWeight]:
        for node in self.file.proto.graph.node:
            operands = WEIGHT_OPERANDS.get(_operator(node), ())
            operand = next((operand for operand in operands if node.input[operand] in self.constants), None)
            if operand is not None:
                yield self._weight(node, operand)
            self._follow(node)

    def _weight(self, node: NodeProto, operand: int) -> OnnxWeight:
        constant = self.constants[node.input[operand]]
        shape = tuple(constant.tensor.dims)
        return OnnxWeight(
            node=node.name or node.output[0],
            op=node.op_type,
            initializer=constant.tensor.name,
            shape=shape,
            dtype=constant.dtype,
            content=Rows(NOTHING) if constant.hidden_by or len(shape) < 2 else self._content(node, constant, operand),
            groups=_attribute(node, "group", 1).i,
            precision=self._precision(node, operand),
            hidden_by=constant.hidden_by,
        )

    def _content(self, node: NodeProto, constant: _Constant, operand: int) -> Rows:
        """The constant as the node reads it."""
        contraction = 1 if node.op_type == "Conv" else _contraction(node, operand)
        layout = id(constant.tensor), constant.axes, contraction
        found = self.rows.get(layout)
        if found is None:
            values = _rows(np.transpose(self._array(constant.tensor), constant.axes), contraction)
            found = self.rows[layout] = Rows(values, self.counts.setdefault(layout, {}))
        return found

    def _array(self, tensor: TensorProto) -> Array:
        found = self.arrays.get(id(tensor))
        if found is None:
            # A copy owns its memory, so every view of it keeps it in the dictionary.
            found = self.arrays[id(tensor)] = read_tensor(self.file, tensor).copy()
        return found

    def _precision(self, node: NodeProto, operand: int) -> str:
        """The integers' type where both operands are quantized; else the type that the weight is dequantized to."""
        dtype = self.constants[node.input[operand]].dtype
        dequantize, other = (self.dequantize.get(node.input[i]) for i in (operand, 1 - operand))
        if dequantize is None:
            return dtype
        scale, *zero_point = (self.constants[name].dtype for name in dequantize.input[1:] if name)
        return scale if other is None else (*zero_point, dtype)[0]

    def _follow(self, node: NodeProto) -> None:
        """Note what is known of the node's outputs."""
        operator, sources = _operator(node), [name for name in node.input if name]
        if operator == "Constant":
            self.constants[node.output[0]] = _stored(_attribute(node, "value").t)
        elif sources and self.constants.keys() >= set(sources):
            self.constants |= dict.fromkeys(node.output, self.constants[sources[0]].behind(node))
        if operator == "DequantizeLinear":
            self.dequantize[node.output[0]] = node
        elif operator in SHAPE_ONLY and sources[0] in self.dequantize:
            self.dequantize[node.output[0]] = self.dequantize[sources[0]]


def _stored(tensor: TensorProto) -> _Constant:
    return _Constant(tensor, tuple(range(len(tensor.dims))))


def _operator(node: NodeProto) -> str:
    """Its name, with the domain where that is not ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _attribute(node: NodeProto, name: str, default: int = 0) -> AttributeProto:
    return next((entry for entry in node.attribute if entry.name == name), AttributeProto(i=default))


def _contraction(node: NodeProto, operand: int) -> int:
    """The axis of a matrix, from its end, that is summed over."""
    return -1 if _attribute(node, "transB" if operand else "transA").i == operand else -2


def _rows(weight: Array, contraction: int) -> Array:
    """The weight as (out-channels, *kernel, in-channels)."""
    rows = np.moveaxis(weight, contraction, -1)
    return rows if contraction == 1 else rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
