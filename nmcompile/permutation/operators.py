"""The operators that the analysis knows, by name.

An operator that only moves elements is run on the labels themselves. PyTorch tags the elementwise ones.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx
from torch.fx.node import Target

from nmcompile.permutation.contract import contract
from nmcompile.permutation.labels import Label, Shape, Value
from nmcompile.permutation.rules import Rules

Result = Value | Sequence[Value]
SIGNATURES = {"linear": "input weight bias", "linear_in_out": "input weight", "addmm": "self mat1 mat2"}
MOVES = {
    "alias", "chunk", "expand", "expand_as", "flatten", "flip", "movedim", "narrow", "numpy_T", "permute",
    "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave", "reshape", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "swapaxes", "t", "tensor_split", "tile", "transpose", "unbind", "unflatten",
    "unsqueeze", "view", "_unsafe_view", "channel_shuffle",
}  # fmt: skip
COPIES = {
    "to", "_to_copy", "type_as", "contiguous", "detach", "lift_fresh_copy", "dropout", "feature_dropout",
    "alpha_dropout", "hardswish", "softshrink", "threshold",
}  # fmt: skip
"""Elementwise operators of one tensor that PyTorch does not tag."""
POOLS = {
    f"{kind}{dims}d{suffix}"
    for kind in (
        "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest", "upsample_bilinear",
        "upsample_bicubic", "upsample_linear", "upsample_trilinear", "_upsample_nearest_exact", "reflection_pad",
        "replication_pad",
    )
    for dims in (1, 2, 3)
    for suffix in ("", "_with_indices")
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod"}
SHAPES = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
          "new_empty", "new_full", "sym_size", "_assert_tensor_metadata"}  # fmt: skip
"""Operators that read no element."""


@dataclass(frozen=True)
class Call:
    """A node's operator, its arguments by name with values in place of nodes, and the shapes of its results."""

    name: str
    target: Target
    arguments: Mapping[str, object]
    shapes: tuple[Shape, ...]
    rules: Rules

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def values(self) -> list[Value]:
        """Return every value among the arguments."""
        found: list[Value] = []
        for one in self.arguments.values():
            found += [v for v in (one if isinstance(one, tuple | list) else [one]) if isinstance(v, Value)]
        return found

    def value(self, *names: str) -> Value:
        """Return the value under the first of these names that is an argument."""
        return cast(Value, next(self.arguments[name] for name in names if name in self.arguments))

    def optional(self, *names: str) -> list[Value]:
        """Return the values under these names, without those that are None."""
        return [one for one in map(self.arguments.get, names) if isinstance(one, Value)]

    def dims(self, name: str, of: Value) -> list[int]:
        """Return an argument that is a dim or several, or every dim if it is None."""
        given = self.arguments.get(name)
        if given is None or given == []:
            return list(range(len(of.shape)))
        return [dim % len(of.shape) for dim in (given if isinstance(given, list | tuple) else [cast(int, given)])]


def call_of(node: fx.Node, shapes: tuple[Shape, ...], rules: Rules, resolve: Callable[[object], object]) -> Call:
    """Return a node's call, with its arguments under the names of the operator's schema."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        names = [one.name for one in schema.arguments]
        name = schema.name.split("::")[-1]
    else:
        name = str(getattr(target, "__name__", target))
        names = SIGNATURES.get(name, "").split() or [str(number) for number in range(len(node.args))]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    arguments = {key: resolve(value) for key, value in given.items()}
    return Call(name.rstrip("_") if name.strip("_") else name, target, arguments, shapes, rules)


def apply(call: Call) -> Result:
    """Return the labels of a call's results, and note its demands."""
    if not any(value.labels for value in call.values) or call.name in SHAPES:
        return _unlabelled(call)
    kinds = ((call.name in MOVES, _move), (_is_pointwise(call), _pointwise))
    rule = RULES.get(call.name) or next((one for is_one, one in kinds if is_one), None)
    if rule is not None:
        try:
            return _with_origin(rule(call), call)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, StopIteration, TypeError, ValueError):
            pass  # arguments of a form that the rule does not expect; what it has demanded so far does no harm
    call.rules.fix(call.values, f"{call.rules.name} is not known to treat channels alike")
    return _unlabelled(call, f"the result of {call.rules.name}, which is not known to treat channels alike")


def _unlabelled(call: Call, origin: str = "") -> Result:
    origin = origin or next((value.origin for value in call.values if value.origin), "")
    found = [Value(shape, (), origin) for shape in call.shapes]
    return found[0] if len(found) == 1 else found


def _with_origin(result: Result, call: Call) -> Result:
    """Return a result that says where it comes from if nothing in it may move."""
    if isinstance(result, Value) and not result.labels:
        return _unlabelled(call)
    return result


def _is_pointwise(call: Call) -> bool:
    tags = call.target.tags if isinstance(call.target, torch._ops.OpOverload) else []
    return torch.Tag.pointwise in tags or call.name in COPIES or call.name == "copy"


def _pointwise(call: Call) -> Value:
    return call.rules.elementwise(call.values, call.shape)


def _move(call: Call) -> Result:
    """Run the operator on each label of its only operand."""
    (value,) = call.optional("self", "input")
    name = next(key for key in ("self", "input") if key in call.arguments)
    rest = {key: one for key, one in call.arguments.items() if key != name}
    target = torch.ops.aten.reshape.default if call.name in ("view", "_unsafe_view") else call.target
    if target is torch.ops.aten.reshape.default:
        rest = {"shape": call.shape}
    if call.name == "expand_as":
        target, rest = torch.ops.aten.expand.default, {"size": call.shape}
    for label in value.labels:
        call.rules.constraints.use(label)

    function = cast(Callable[..., Tensor | Sequence[Tensor]], target)

    def move(label: Label, index: int | None = None) -> Tensor:
        moved = function(**{name: label}, **rest)
        return cast(Tensor, moved if index is None else moved[index])

    if len(call.shapes) == 1 and not call.name.startswith(("split", "chunk", "unbind", "tensor_split")):
        return value.moved(move, call.shape)
    return [value.moved(partial(move, index=index), shape) for index, shape in enumerate(call.shapes)]


def _linear(call: Call) -> Value:
    x, weight = call.value("input", "mat1", "self"), call.value("weight", "mat2")
    is_in_out = call.name != "linear"
    lead = _letters(len(x.shape) - 1)
    equation = (lead + "i", "io" if is_in_out else "oi", lead + "o")
    result = contract(call.rules.constraints, call.rules.name, x, weight, equation, call.shape)
    return call.rules.elementwise([result, *call.optional("bias")], call.shape)


def _addmm(call: Call) -> Value:
    product = _product(call, call.value("mat1", "batch1"), call.value("mat2", "batch2"), call.shape)
    return call.rules.elementwise([product, *call.optional("self")], call.shape)


def _matmul(call: Call) -> Value:
    return _product(call, call.value("self", "input"), call.value("other", "mat2", "tensor2"), call.shape)


def _product(call: Call, left: Value, right: Value, shape: Shape) -> Value:
    """Contract the last dim of the left operand with the second-last dim of the right one, as matmul does."""
    batch = _letters(max(len(left.shape), len(right.shape)) - 2)
    lead = "" if len(left.shape) == 1 else batch[len(batch) - (len(left.shape) - 2) :] + "x"
    tail = "" if len(right.shape) == 1 else "z"
    second = "y" if not tail else batch[len(batch) - (len(right.shape) - 2) :] + "yz"
    result = batch * (len(shape) > 2 or len(batch) == 0) + ("x" if lead else "") + tail
    return contract(call.rules.constraints, call.rules.name, left, right, (lead + "y", second, result), shape)


def _einsum(call: Call) -> Value:
    text, operands = str(call.arguments["equation"]).replace(" ", ""), call.values
    inputs, _, result = text.partition("->")
    if len(operands) != 2 or "." in text or not result:
        call.rules.fix(operands, f"{call.rules.name} is an einsum that is not analyzed")
        return Value(call.shape)
    left, right = inputs.split(",")
    return contract(
        call.rules.constraints, call.rules.name, operands[0], operands[1], (left, right, result), call.shape
    )


def _attention(call: Call) -> Value:
    """Contract queries with keys, and weights with values; heads stay apart."""
    query, key, value = call.value("query"), call.value("key"), call.value("value")
    call.rules.fix(call.optional("attn_mask"), f"{call.rules.name} adds them to scores")
    if call.arguments.get("enable_gqa"):
        key, value = (_repeated(one, query.shape[-3] // one.shape[-3]) for one in (key, value))
    lead = _letters(len(query.shape) - 2)
    scores = Value((*query.shape[:-1], key.shape[-2]))
    rules = call.rules
    found = contract(rules.constraints, rules.name, query, key, (lead + "xy", lead + "zy", lead + "xz"), scores.shape)
    rules.fix([found], f"{rules.name} takes a softmax over them")
    return contract(rules.constraints, rules.name, scores, value, (lead + "xz", lead + "zv", lead + "xv"), call.shape)


def _repeated(value: Value, count: int) -> Value:
    shape = (*value.shape[:-3], value.shape[-3] * count, *value.shape[-2:])
    return value.moved(lambda label: label.repeat_interleave(count, -3), shape)


def _convolution(call: Call) -> Value:
    """Contract channels within groups; positions mix."""
    x, weight = call.value("input"), call.value("weight")
    is_transposed = bool(call.arguments.get("transposed")) or "transpose" in call.name
    groups = cast(int, call.arguments.get("groups", 1))
    dims = len(weight.shape) - 2
    batch = "n" * (len(x.shape) - dims - 1)
    x = call.rules.pooled(x, x.shape[: len(batch) + 1] + (1,) * dims, range(len(batch) + 1, len(x.shape)))
    weight = call.rules.pooled(weight, weight.shape[:2] + (1,) * dims, range(2, dims + 2))
    left = _viewed(x, (*x.shape[: len(batch)], groups, -1))
    right = _viewed(weight, (groups, -1, weight.shape[1]))
    shape = (*x.shape[: len(batch)], groups, call.shape[len(batch)] // groups)
    equation = (batch + "gi", "gio" if is_transposed else "goi", batch + "go")
    product = contract(call.rules.constraints, call.rules.name, left, right, equation, shape)
    flat = _viewed(product, (*shape[: len(batch)], -1, *(1,) * dims))
    result = Value(call.shape, flat.labels)
    return call.rules.elementwise([result, *_as_channels(call, dims, "bias")], call.shape)


def _viewed(value: Value, shape: Shape) -> Value:
    sizes = tuple(torch.empty(value.shape, device="meta").view(shape).shape)
    return value.moved(lambda label: label.reshape(sizes), sizes)


def _as_channels(call: Call, trailing: int, *names: str) -> list[Value]:
    """Return vectors of one value a channel, with dims of size 1 behind."""
    return [_viewed(one, (-1, *(1,) * trailing)) for one in call.optional(*names)]


def _batch_norm(call: Call) -> Value:
    x = call.value("input")
    held = _as_channels(call, len(x.shape) - 2, "weight", "bias", "running_mean", "running_var")
    return call.rules.elementwise([x, *held], call.shape)


def _group_norm(call: Call) -> Value:
    x, groups = call.value("input"), cast(int, call.arguments["num_groups"])
    grouped = _viewed(x, (x.shape[0], groups, -1, *x.shape[2:]))
    call.rules.reduced(grouped, range(2, len(grouped.shape)))
    return call.rules.elementwise([x, *_as_channels(call, len(x.shape) - 2, "weight", "bias")], call.shape)


def _layer_norm(call: Call) -> Value:
    x, count = call.value("input"), len(cast(Sequence[int], call.arguments["normalized_shape"]))
    call.rules.reduced(x, range(-count, 0))
    return call.rules.elementwise([x, *call.optional("weight", "bias")], call.shape)


def _softmax(call: Call) -> Value:
    x = call.value("self", "input")
    call.rules.reduced(x, call.dims("dim", x))
    return Value(call.shape, x.labels)


def _reduction(call: Call) -> Value:
    x = call.value("self", "input")
    dims = call.dims("dim", x)
    left = Value(x.shape, call.rules.reduced(x, dims))
    if len(call.shape) == len(x.shape):
        return Value(call.shape, left.labels)
    kept = [size for dim, size in enumerate(x.shape) if dim not in dims]
    inner = [dim for dim in range(len(x.shape)) if dim not in dims]
    assert tuple(kept) == call.shape
    return Value(call.shape, tuple(one.reshape([one.shape[dim] for dim in inner]) for one in left.labels))


def _cat(call: Call) -> Value:
    dim = cast(int, call.arguments.get("dim", 0))
    values = [value for value in call.values if value.shape != (0,)]
    return call.rules.joined(values, dim, call.shape)


def _stack(call: Call) -> Value:
    dim = cast(int, call.arguments.get("dim", 0)) % len(call.shape)
    sizes = [(*value.shape[:dim], 1, *value.shape[dim:]) for value in call.values]
    return call.rules.joined([_viewed(*one) for one in zip(call.values, sizes, strict=True)], dim, call.shape)


def _pad(call: Call) -> Result:
    if call.arguments.get("mode", "constant") == "constant":
        return call.rules.padded(call.value("self"), cast(Sequence[int], call.arguments["pad"]), call.shape)
    return _pool(call)


def _pool(call: Call) -> Result:
    x = call.value("self", "input")
    found = [call.rules.pooled(x, shape, range(2, len(x.shape))) for shape in call.shapes]
    return found if len(found) > 1 else found[0]


def _embedding(call: Call) -> Value:
    return call.rules.carried(call.value("weight"), call.shape, 1)


def _index(call: Call) -> Value:
    """Carry what lies after the last indexed dim."""
    x = call.value("self")
    given = call.arguments.get("indices", call.arguments.get("index"))
    indices = list(given) if isinstance(given, tuple | list) else [given]
    call.rules.fix([one for one in indices if isinstance(one, Value)], f"{call.rules.name} uses them as indices")
    last = cast(int, call.arguments["dim"]) % len(x.shape) if "dim" in call.arguments else len(indices) - 1
    return call.rules.carried(x, call.shape, len(x.shape) - 1 - last)


def _getitem(call: Call) -> Value:
    sequence, index = call.arguments.values()
    return cast(Sequence[Value], sequence)[cast(int, index)]


def _glu(call: Call) -> Value:
    x = call.value("self")
    dim = cast(int, call.arguments.get("dim", -1))
    halves = [x.moved(partial(_half, dim=dim, part=part), call.shape) for part in (0, 1)]
    return call.rules.elementwise(halves, call.shape)


def _half(label: Label, dim: int, part: int) -> Tensor:
    return label.chunk(2, dim)[part]


def _prelu(call: Call) -> Value:
    x = call.value("self")
    return call.rules.elementwise([x, *_as_channels(call, max(0, len(x.shape) - 2), "weight")], call.shape)


def _letters(count: int) -> str:
    return "abcdefgh"[:count]


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {
    **dict.fromkeys(("linear", "linear_in_out"), _linear),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys((f"conv_transpose{dims}d" for dims in (1, 2, 3)), _convolution),
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("index", "index_select"), _index),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "group_norm": _group_norm,
    "stack": _stack,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    "glu": _glu,
    "prelu": _prelu,
    operator.getitem.__name__: _getitem,
}
