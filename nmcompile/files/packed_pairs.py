"""2:4 integers in 8/3 bits each, and the ONNX function that unpacks them.

Of four weights along in-channels two integers are stored, and which two places they have, one of six pairs:

    kept      uint8 (..., in / 4): 16 (first + 8) + (second + 8)
    triples   uint8 (groups / 3, rounded up): 36 p + 6 q + r, the pairs of three groups in the order of `kept`

A runtime computes the function once, when it loads the file: all that it reads are constants. Indices are looked up in
two tables, because that takes the same few operators on any runtime: no shifts, and no tensors of 4-bit integers.
"""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int8]

DOMAIN, OPERATOR = "nmcompile", "UnpackPairs"
BLOCK = 4
PAIRS = np.array(list(combinations(range(BLOCK), 2)))
TRIPLES = np.array(list(product(range(len(PAIRS)), repeat=3)), np.int32)
LOW, HIGH = -8, 7
_CODES = np.arange(2**8)


def holds(weight: Integers) -> bool:
    """Return whether a weight `(..., in)` can be packed: whole blocks with at most two non-zeros of 4 bits each."""
    if not weight.size or weight.shape[-1] % BLOCK or weight.min() < LOW or weight.max() > HIGH:
        return False
    return bool((np.count_nonzero(_blocks(weight), axis=1) <= PAIRS.shape[1]).all())


def pack(weight: Integers) -> tuple[Bytes, Bytes]:
    """Return a weight `(..., in)` that `holds` as `kept` and `triples`."""
    blocks = _blocks(weight)
    lost = np.stack([np.delete(blocks, pair, axis=1).any(axis=1) for pair in PAIRS])
    pairs = lost.argmin(axis=0)
    first, second = (np.take_along_axis(blocks, PAIRS[pairs, i : i + 1], axis=1)[:, 0] for i in (0, 1))
    kept = (first - LOW).astype(np.uint8) * 16 + (second - LOW).astype(np.uint8)
    threes = np.pad(pairs, (0, -len(pairs) % 3)).reshape(-1, 3)
    triples = (threes @ (len(PAIRS) ** 2, len(PAIRS), 1)).astype(np.uint8)
    return kept.reshape(*weight.shape[:-1], -1), triples


def unpack(kept: Array, triples: Array) -> Integers:
    """Return the weight `(..., in)`, as the function computes it.

    Raises:
        ValueError: the two are not those of one weight.
    """
    if kept.dtype != np.uint8 or triples.dtype != np.uint8 or not kept.ndim:
        raise ValueError(f"packed pairs are {kept.dtype} and {triples.dtype} of {kept.ndim} dims; expected bytes")
    if triples.shape != (-(-kept.size // 3),) or triples.max(initial=0) >= len(TRIPLES):
        raise ValueError(f"the pairs of {kept.size} blocks are {triples.shape} bytes up to {triples.max(initial=0)}")
    pairs = TRIPLES[triples].reshape(-1)[: kept.size].reshape(kept.shape)
    blocks: Integers = _table()[pairs * len(_CODES) + kept]
    return blocks.reshape(*kept.shape[:-1], -1)


def unpack_function(opset: int) -> FunctionProto:
    """Return `UnpackPairs (kept, triples) => (weight)`, of standard operators."""
    rows = (TRIPLES * len(_CODES)).astype(np.int32)  # of the table of blocks, where each pair's begin
    nodes = [
        _constant("rows", rows),
        _constant("blocks", _table()),
        _constant("flat", np.array([-1])),
        _constant("start", np.array([0])),
        helper.make_node("Cast", ["triples"], ["triple"], to=TensorProto.INT32),
        helper.make_node("Gather", ["rows", "triple"], ["threes"]),
        helper.make_node("Reshape", ["threes", "flat"], ["padded"]),
        helper.make_node("Size", ["kept"], ["count"]),
        helper.make_node("Reshape", ["count", "flat"], ["end"]),
        helper.make_node("Slice", ["padded", "start", "end"], ["row"]),
        helper.make_node("Shape", ["kept"], ["shape"]),
        helper.make_node("Reshape", ["row", "shape"], ["base"]),
        helper.make_node("Cast", ["kept"], ["code"], to=TensorProto.INT32),
        helper.make_node("Add", ["base", "code"], ["index"]),
        helper.make_node("Gather", ["blocks", "index"], ["grouped"]),
        helper.make_node("Shape", ["kept"], ["outer"], end=-1),
        helper.make_node("Concat", ["outer", "flat"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["grouped", "wanted"], ["weight"]),
    ]
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, OPERATOR, ["kept", "triples"], ["weight"], nodes, opsets)


def unpacks_pairs(functions: Sequence[FunctionProto]) -> bool:
    """Return whether a file's function of that name is the one above: another writer's may compute anything."""
    named = [one for one in functions if (one.domain, one.name) == (DOMAIN, OPERATOR)]
    return len(named) == 1 and _meaning(named[0]) == _meaning(unpack_function(21))


def _meaning(function: FunctionProto) -> list[object]:
    nodes = [
        (node.op_type, node.domain, *node.input, "->", *node.output, *map(_attribute, node.attribute))
        for node in function.node
    ]
    return [list(function.input), list(function.output), *nodes]


def _attribute(attribute: AttributeProto) -> tuple[object, ...]:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        array = numpy_helper.to_array(value)
        return attribute.name, array.dtype.str, array.shape, array.tobytes()
    return attribute.name, value


def _table() -> Integers:
    """Return the blocks, `(6 * 256, 4)`, of every pair with every byte of `kept`."""
    table = np.zeros((len(PAIRS), len(_CODES), BLOCK), np.int8)
    for of_pair, (first, second) in zip(table, PAIRS, strict=True):
        of_pair[:, first], of_pair[:, second] = _CODES // 16 + LOW, _CODES % 16 + LOW
    return table.reshape(-1, BLOCK)


def _constant(name: str, content: npt.NDArray[np.generic]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(content))


def _blocks(weight: Integers) -> Integers:
    return np.ascontiguousarray(weight).reshape(-1, BLOCK)
