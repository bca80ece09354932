"""Constant weights that an ONNX file multiplies by, read as its runtimes see them, whoever wrote the file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, NodeProto, TensorProto

from nmcompile.errors import FileError
from nmcompile.files import packed_pairs
from nmcompile.files.open_onnx import OnnxFile, read_tensor
from nmcompile.pruning.pattern import NMPattern

Array = npt.NDArray[np.generic]
NOTHING: Array = np.zeros((0, 0), np.int8)
WEIGHT_OPERANDS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1, 0), "MatMul": (1, 0)}
IN_CHANNELS = {"Conv": 1, "ConvTranspose": 0}
TRANSPARENT = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})  # sparsity is seen through these
SHAPE_ONLY = frozenset({"Transpose", "Reshape", "Flatten", "Identity"})
UNPACK = f"{packed_pairs.DOMAIN}.{packed_pairs.OPERATOR}"
PACKED = "INT4 pairs"
PATTERNS = tuple(NMPattern.parse(text) for text in ("1:4", "2:4", "2:8", "4:8"))

_Identity = tuple[int, int]
_Layout = tuple[_Identity, tuple[int, ...], int]
"""How a node reads a weight: its identity, its axes in their order, and the axis that is summed over."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight as (out-channels, *kernel, in-channels of one group), shared by all nodes that read it in this layout.

    Attributes:
        values: its elements.
        counts: cached counts, by pattern and for non-zeros; they outlive the values.
    """

    values: Array
    counts: dict[NMPattern | None, int] = field(default_factory=dict)

    def nonzeros(self) -> int:
        """Count the elements that are not zero."""
        if None not in self.counts:
            self.counts[None] = int(np.count_nonzero(self.values))
        return self.counts[None]

    def violations(self, pattern: NMPattern) -> int:
        """Count the blocks along in-channels with more than N non-zeros; an incomplete last block counts as one."""
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
        node: the node's name.
        op: Conv, ConvTranspose, Gemm or MatMul.
        initializer: the name of the stored weight.
        shape: shape of the stored weight.
        dtype: type of the stored weight, "INT8" for example.
        content: the weight itself; empty if it is hidden.
        groups: groups of the convolution.
        precision: type in which the product is computed, "INT8" or "FLOAT16" for example.
        hidden_by: the operator that hides the zeros from runtimes, "Mul" for example; "" if there is none.
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
        """Return the weight as (out-channels, *kernel, in-channels of one group)."""
        return self.content.values

    @property
    def out_channels(self) -> int:
        return int(self.rows.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.rows.shape[-1])

    @property
    def kernel(self) -> int:
        """Return the number of positions of a convolution's kernel; 1 for Gemm and MatMul."""
        return math.prod(self.rows.shape[1:-1])

    @property
    def zeros(self) -> float:
        """Return the fraction of zeros."""
        return 1 - self.content.nonzeros() / self.rows.size if self.rows.size else 0.0

    @property
    def patterns(self) -> tuple[NMPattern, ...]:
        """Return the usual patterns that the weight obeys in whole blocks."""
        fitting = (pattern for pattern in PATTERNS if self.rows.size and self.in_channels % pattern.block == 0)
        return tuple(pattern for pattern in fitting if not self.violations(pattern))

    def violations(self, pattern: NMPattern) -> int:
        """Count the blocks along in-channels with more than N non-zeros."""
        return self.content.violations(pattern)


def read_weights(file: OnnxFile) -> Iterator[OnnxWeight]:
    """Yield every Conv, ConvTranspose, Gemm and MatMul of the main graph that multiplies by a constant, in graph order.

    If the caller drops each weight, only one is in memory at a time; nodes that read the same weight share its array.

    Raises:
        FileError: a weight that holds another number of elements than it declares.
    """
    yield from _Reader(file).weights()


@dataclass(frozen=True)
class _Constant:
    """A value computed from stored tensors alone: the first of these tensors, and the operators applied to it.

    With `triples` it is a packed weight: the tensor holds what was kept of it.
    """

    tensor: TensorProto
    axes: tuple[int, ...]  # the weight's axes, in their present order
    hidden_by: str = ""
    triples: TensorProto | None = None

    @property
    def identity(self) -> _Identity:
        """Return what tells the stored weight from others of the file."""
        return id(self.tensor), id(self.triples)

    @property
    def dtype(self) -> str:
        return PACKED if self.triples is not None else str(TensorProto.DataType.Name(self.tensor.data_type))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the stored weight."""
        if self.triples is None:
            return tuple(self.tensor.dims)
        return (*self.tensor.dims[:-1], packed_pairs.BLOCK * self.tensor.dims[-1])

    def behind(self, node: NodeProto) -> "_Constant":
        """Return the value after the node."""
        operator = _operator(node)
        if self.hidden_by or operator in TRANSPARENT:
            return self
        order = tuple(_attribute(node, "perm").ints) or tuple(reversed(range(len(self.axes))))
        if operator == "Transpose" and sorted(order) == sorted(self.axes):
            return replace(self, axes=tuple(self.axes[axis] for axis in order))
        return replace(self, hidden_by=operator)


class _Reader:
    """A walk over the nodes in their topological order; recursion would overflow the stack on deep graphs."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.constants = {tensor.name: _stored(tensor) for tensor in file.proto.graph.initializer}
        self.dequantize: dict[str, NodeProto] = {}  # DequantizeLinear by the value it produces
        self.arrays: WeakValueDictionary[_Identity, Array] = WeakValueDictionary()
        self.rows: WeakValueDictionary[_Layout, Rows] = WeakValueDictionary()
        self.has_pairs = packed_pairs.unpacks_pairs(file.proto.functions)
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
        shape = constant.shape
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
        """Return the constant in the layout in which the node reads it."""
        contraction = _contraction(node, operand)
        layout = constant.identity, constant.axes, contraction
        found = self.rows.get(layout)
        if found is None:
            values = _rows(np.transpose(self._array(constant), constant.axes), contraction)
            found = self.rows[layout] = Rows(values, self.counts.setdefault(layout, {}))
        return found

    def _array(self, constant: _Constant) -> Array:
        found = self.arrays.get(constant.identity)
        if found is None:
            # A copy owns its memory, so a view of it keeps its entry in the dictionary alive.
            found = self.arrays[constant.identity] = self._read(constant).copy()
        return found

    def _read(self, constant: _Constant) -> Array:
        content = read_tensor(self.file, constant.tensor)
        if constant.triples is None:
            return content
        try:
            return packed_pairs.unpack(content, read_tensor(self.file, constant.triples))
        except ValueError as error:
            raise FileError(f"{self.file.name}: tensor {constant.tensor.name!r} cannot be read ({error})") from error

    def _precision(self, node: NodeProto, operand: int) -> str:
        """Return the integer type if both operands are quantized, else the type that the weight is dequantized to."""
        dtype = self.constants[node.input[operand]].dtype
        dequantize, other = (self.dequantize.get(node.input[i]) for i in (operand, 1 - operand))
        if dequantize is None:
            return dtype
        scale, *zero_point = (self.constants[name].dtype for name in dequantize.input[1:] if name)
        return scale if other is None else (*zero_point, dtype)[0]

    def _follow(self, node: NodeProto) -> None:
        """Note the node's outputs that are constant or dequantized."""
        operator, sources = _operator(node), [name for name in node.input if name]
        if operator == "Constant":
            self.constants[node.output[0]] = _stored(_attribute(node, "value").t)
        elif operator == UNPACK and self.has_pairs and self._is_stored(sources):
            kept, triples = (self.constants[name].tensor for name in sources)
            self.constants[node.output[0]] = _Constant(kept, tuple(range(len(kept.dims))), triples=triples)
        elif sources and self.constants.keys() >= set(sources):
            self.constants |= dict.fromkeys(node.output, self.constants[sources[0]].behind(node))
        if operator == "DequantizeLinear":
            self.dequantize[node.output[0]] = node
        elif operator in SHAPE_ONLY and sources[0] in self.dequantize:
            self.dequantize[node.output[0]] = self.dequantize[sources[0]]

    def _is_stored(self, names: Sequence[str]) -> bool:
        """Return whether values are two tensors as they are stored."""
        found = [self.constants.get(name) for name in names]
        return len(found) == 2 and all(one is not None and one == _stored(one.tensor) for one in found)


def _stored(tensor: TensorProto) -> _Constant:
    return _Constant(tensor, tuple(range(len(tensor.dims))))


def _operator(node: NodeProto) -> str:
    """Return the operator's name, prefixed with its domain unless that is ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _attribute(node: NodeProto, name: str, default: int = 0) -> AttributeProto:
    return next((entry for entry in node.attribute if entry.name == name), AttributeProto(i=default))


def _contraction(node: NodeProto, operand: int) -> int:
    """Return the axis that is summed over: that of in-channels, or that of a matrix, counted from the end."""
    if node.op_type in IN_CHANNELS:
        return IN_CHANNELS[node.op_type]
    return -1 if _attribute(node, "transB" if operand else "transA").i == operand else -2


def _rows(weight: Array, contraction: int) -> Array:
    """Return the weight as (out-channels, *kernel, in-channels)."""
    rows = np.moveaxis(weight, contraction, -1)
    return rows if contraction >= 0 else rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
