"""The operators that the analysis knows, by name.

An operator that only moves elements is run on the labels themselves. PyTorch tags the elementwise ones.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from nmcompile.permutation.call import Call, Result, as_channels, viewed
from nmcompile.permutation.labels import Label, Value
from nmcompile.permutation.products import addmm, attention, convolution, einsum, linear, matmul

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
    f"{kind}{dims}d{suffix}": dims
    for kind in (
        "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest", "upsample_bilinear",
        "upsample_bicubic", "upsample_linear", "upsample_trilinear", "_upsample_nearest_exact", "reflection_pad",
        "replication_pad",
    )
    for dims in (1, 2, 3)
    for suffix in ("", "_with_indices")
}  # fmt: skip
"""Number of last dims that an operator mixes, by name: inputs come with a batch and without."""
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod"}
SHAPES = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
          "new_empty", "new_full", "sym_size", "_assert_tensor_metadata"}  # fmt: skip
"""Operators that read no element."""


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


def _batch_norm(call: Call) -> Value:
    x = call.value("input")
    held = as_channels(call, len(x.shape) - 2, "weight", "bias", "running_mean", "running_var")
    return call.rules.elementwise([x, *held], call.shape)


def _group_norm(call: Call) -> Value:
    x, groups = call.value("input"), cast(int, call.arguments["num_groups"])
    grouped = viewed(x, (x.shape[0], groups, -1, *x.shape[2:]))
    call.rules.reduced(grouped, range(2, len(grouped.shape)))
    return call.rules.elementwise([x, *as_channels(call, len(x.shape) - 2, "weight", "bias")], call.shape)


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
    return call.rules.joined([viewed(*one) for one in zip(call.values, sizes, strict=True)], dim, call.shape)


def _pad(call: Call) -> Result:
    if call.arguments.get("mode", "constant") == "constant":
        return call.rules.padded(call.value("self"), cast(Sequence[int], call.arguments["pad"]), call.shape)
    return _mix_last(call, len(cast(Sequence[int], call.arguments["pad"])) // 2)


def _pool(call: Call) -> Result:
    return _mix_last(call, POOLS[call.name])


def _mix_last(call: Call, count: int) -> Result:
    """Mix the last dims; those before them are channels, or batch and channels."""
    x = call.value("self", "input")
    found = [call.rules.pooled(x, shape, range(len(x.shape) - count, len(x.shape))) for shape in call.shapes]
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
    return call.rules.elementwise([x, *as_channels(call, max(0, len(x.shape) - 2), "weight")], call.shape)


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {
    **dict.fromkeys(("linear", "linear_in_out"), linear),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    **dict.fromkeys((f"conv_transpose{dims}d" for dims in (1, 2, 3)), convolution),
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("index", "index_select"), _index),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "group_norm": _group_norm,
    "stack": _stack,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
    "glu": _glu,
    "prelu": _prelu,
    operator.getitem.__name__: _getitem,
}
