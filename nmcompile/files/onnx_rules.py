"""Rules that refuse valid ONNX files on which a runtime would crash or never end.

Each rule comes from a crash found in ONNX Runtime. The rules see nodes, attributes and stored tensors, but not the
values that a graph computes from its inputs: `SECURITY.md` says what that leaves.
"""

import math
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, numpy_helper
from onnx.defs import OpSchema

from nmcompile.errors import FileError
from nmcompile.files.open_onnx import OnnxFile, read_tensor

MOST_CALLED = 2**15  # nodes that calls of functions add
DEEPEST = 64  # nested graphs and functions
MOST_TURNS = 2**24  # iterations of a loop that nothing ends sooner, times those of the loops around it
WEIGHTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger"), (1,)),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2)),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
    **dict.fromkeys(
        ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "FusedConv"), (1,)
    ),  # ONNX Runtime's
    **dict.fromkeys(("FusedMatMul", "FusedGemm"), (0, 1)),
    "DequantizeLinear": (0,),
    "QGemm": (3,),
}  # inputs that are weights if they are stored tensors
SINGLE = {"Loop": (0, 1), "If": (0,)}  # inputs that must be one number
ABOVE_ZERO = {"STFT": (1, 3)}  # inputs that ONNX Runtime divides by
SIGNED = (TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)

Option = OpSchema.FormalParameterOption
_Declared = tuple[tuple[Option, ...], tuple[Option, ...]]


class _Missing:
    """A function input that the call leaves out."""


MISSING = _Missing()
Known = ChainMap[str, TensorProto | _Missing | None]
"""Meaning of each name, in this graph and those around it: a stored tensor, a missing input, or a computed value."""


def check_runnable(file: OnnxFile) -> None:
    """Check the model against every rule.

    Raises:
        FileError: a node breaks a rule; names the node and the problem.
    """
    _Walk(file).graph(file.proto.graph, ChainMap({"": MISSING}), _Place(_opsets(file.proto.opset_import)))


@dataclass(frozen=True)
class _Place:
    """Context of a node: operator versions, nesting depth, least number of runs, and whether a call adds it."""

    opsets: dict[str, int]
    depth: int = 0
    turns: int = 1
    is_called: bool = False

    def inside(self, turns: int = 1) -> "_Place":
        return replace(self, depth=self.depth + 1, turns=self.turns * turns)


class _Walk:
    """A walk over the nodes; it visits a function's body once per call."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.functions = {(_domain(f.domain), f.name, f.overload): f for f in file.proto.functions}
        self.schemas: dict[tuple[str, str, int], _Declared] = {}
        self.minus_one: dict[int, tuple[TensorProto, bool]] = {}  # by the tensor's identity
        self.called = 0

    def graph(self, graph: GraphProto, known: Known, place: _Place) -> None:
        own = known.new_child(dict.fromkeys(value.name for value in graph.input))
        own.update({tensor.name: tensor for tensor in graph.initializer if tensor.name})
        self._nodes(graph.node, own, place)

    def _nodes(self, nodes: Iterable[NodeProto], known: Known, place: _Place) -> None:
        for node in nodes:
            self.called += place.is_called
            if self.called > MOST_CALLED:
                raise self._refused(node, f"calls of functions add more than {MOST_CALLED} nodes")
            if place.depth > DEEPEST:
                raise self._refused(node, f"is nested in more than {DEEPEST} graphs and functions")
            self._node(node, known, place)
            known.update(dict.fromkeys(filter(None, node.output), _stored(node, known)))

    def _node(self, node: NodeProto, known: Known, place: _Place) -> None:
        function = self.functions.get((_domain(node.domain), node.op_type, node.overload))
        if function is not None:
            self._call(node, function, known, place)
            return
        self._check_operands(node, known, place)
        self._check_weights(node, known)
        if _domain(node.domain) == "":
            self._check_numbers(node, known)
        turns = self._turns(node, known)
        if turns * place.turns > MOST_TURNS:
            raise self._refused(node, f"runs more than {MOST_TURNS} times, and nothing ends it sooner")
        for graph in _subgraphs(node):
            self.graph(graph, known, place.inside(turns))

    def _call(self, node: NodeProto, function: FunctionProto, known: Known, place: _Place) -> None:
        given: dict[str, TensorProto | _Missing | None] = {**dict.fromkeys(function.input, MISSING), "": MISSING}
        given |= {formal: known.get(name) for formal, name in zip(function.input, node.input, strict=False)}
        inside = replace(place.inside(), opsets=_opsets(function.opset_import), is_called=True)
        self._nodes(function.node, ChainMap(given), inside)

    def _check_operands(self, node: NodeProto, known: Known, place: _Place) -> None:
        """Check that no operand is left out of a variadic operator, which reads them all."""
        inputs, outputs = self._declared(node, place)
        for option, name in zip(_repeated(inputs), node.input, strict=False):
            if option != Option.Optional and known.get(name) is MISSING:
                raise self._refused(node, "leaves out an input that is not optional")
        for option, name in zip(_repeated(outputs), node.output, strict=False):
            if option == Option.Variadic and not name:
                raise self._refused(node, "leaves out one of its outputs; give each a name")

    def _check_weights(self, node: NodeProto, known: Known) -> None:
        for tensor in _tensors(node, WEIGHTS.get(node.op_type, ()), known):
            if len(tensor.dims) > 1 and 0 in tensor.dims:
                raise self._refused(node, f"multiplies by a weight without elements, of shape {list(tensor.dims)}")

    def _check_numbers(self, node: NodeProto, known: Known) -> None:
        """Check counts, sizes and divisors that are stored in the file."""
        for tensor in _tensors(node, SINGLE.get(node.op_type, ()), known):
            if math.prod(tensor.dims) != 1:
                raise self._refused(node, f"reads a number of shape {list(tensor.dims)}, not a single element")
        for tensor in _tensors(node, ABOVE_ZERO.get(node.op_type, ()), known):
            if not (self._integers(tensor) > 0).all():
                raise self._refused(node, "has a size or a step that is not above zero")
        if node.op_type == "Div" and any(self._has_minus_one(tensor) for tensor in _tensors(node, (1,), known)):
            raise self._refused(node, "divides integers by -1, which the smallest of them cannot be; use Neg")

    def _has_minus_one(self, tensor: TensorProto) -> bool:
        """Return whether integers contain -1; cached, since many nodes may read a large tensor."""
        if tensor.data_type not in SIGNED:
            return False
        if id(tensor) not in self.minus_one:
            self.minus_one[id(tensor)] = tensor, bool((read_tensor(self.file, tensor) == -1).any())
        return self.minus_one[id(tensor)][1]

    def _turns(self, node: NodeProto, known: Known) -> int:
        """Return the least number of times that the graphs in a node run, as far as the file tells."""
        if node.op_type != "Loop" or _domain(node.domain) or any(self._may_end(g, known) for g in _subgraphs(node)):
            return 1
        count = known.get(node.input[0] if node.input else "")
        if count is MISSING:
            return MOST_TURNS + 1
        return max(1, self._number(count)) if isinstance(count, TensorProto) else 1

    def _may_end(self, body: GraphProto, known: Known) -> bool:
        """Return whether a loop's body can end the loop; a constant true, or the previous condition, never ends it."""
        own = known.new_child({tensor.name: tensor for tensor in body.initializer})
        last = body.input[1].name if len(body.input) > 1 else ""
        answers = {last}
        for node in body.node:
            if node.op_type == "Identity" and answers.intersection(node.input):
                answers.update(node.output)
            own.update(dict.fromkeys(node.output, _stored(node, own)))
        answer = body.output[0].name if body.output else ""
        constant = own.get(answer)
        return answer not in answers and not (isinstance(constant, TensorProto) and self._number(constant))

    def _number(self, tensor: TensorProto) -> int:
        """Return the largest element; 0 for an empty tensor."""
        return int(self._integers(tensor).max(initial=0))

    def _integers(self, tensor: TensorProto) -> npt.NDArray[np.int64]:
        """Return the elements as integers; an empty array if they are not integers."""
        values = read_tensor(self.file, tensor)
        return values.astype(np.int64) if values.dtype.kind in "biu" else np.zeros(0, np.int64)

    def _declared(self, node: NodeProto, place: _Place) -> "_Declared":
        """Return the operator's declared inputs and outputs; none if only a runtime knows the operator."""
        key = _domain(node.domain), node.op_type, place.opsets.get(_domain(node.domain), 1)
        if key not in self.schemas:
            domain, name, version = key
            schema = onnx.defs.get_schema(name, version, domain) if onnx.defs.has(name, version, domain) else None
            operands = (schema.inputs, schema.outputs) if schema is not None else ((), ())
            inputs, outputs = (tuple(parameter.option for parameter in formal) for formal in operands)
            self.schemas[key] = inputs, outputs
        return self.schemas[key]

    def _refused(self, node: NodeProto, problem: str) -> FileError:
        name = node.name or next(iter(node.output), "")
        return FileError(
            f"{self.file.name}: node {name!r} ({node.op_type}) {problem}; ONNX Runtime would crash, or not end"
        )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(entry.domain): entry.version for entry in imports}


def _repeated(options: Sequence[Option]) -> Iterator[Option]:
    """Yield the options; repeat the last one without end if it is variadic."""
    yield from options
    while options and options[-1] == Option.Variadic:
        yield options[-1]


def _tensors(node: NodeProto, operands: Iterable[int], known: Known) -> Iterator[TensorProto]:
    """Yield the inputs of a node that are stored tensors."""
    for operand in operands:
        tensor = known.get(node.input[operand]) if operand < len(node.input) else None
        if isinstance(tensor, TensorProto):
            yield tensor


def _stored(node: NodeProto, known: Known) -> TensorProto | _Missing | None:
    """Return the stored tensor that a node outputs; None if it computes its output."""
    if node.op_type == "Identity" and node.input:
        return known.get(node.input[0])
    for attribute in node.attribute if node.op_type == "Constant" else ():
        if not attribute.ref_attr_name:
            return _tensor(attribute)
    return None


def _tensor(attribute: AttributeProto) -> TensorProto | None:
    """Return the value of a Constant if it is a tensor or integers."""
    if attribute.type == AttributeProto.TENSOR:
        tensor: TensorProto = attribute.t
        return tensor
    if attribute.type in (AttributeProto.INT, AttributeProto.INTS):
        return numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), np.int64))
    return None


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
