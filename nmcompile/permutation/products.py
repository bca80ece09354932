"""The operators that multiply and sum: labels of the summed channels meet, those of the others go on."""

from typing import cast

from nmcompile.permutation.call import Call, as_channels, viewed
from nmcompile.permutation.contract import contract
from nmcompile.permutation.labels import Shape, Value


def linear(call: Call) -> Value:
    x, weight = call.value("input", "mat1", "self"), call.value("weight", "mat2")
    is_in_out = call.name != "linear"
    lead = _letters(len(x.shape) - 1)
    equation = (lead + "i", "io" if is_in_out else "oi", lead + "o")
    result = contract(call.rules.constraints, call.rules.name, x, weight, equation, call.shape)
    return call.rules.elementwise([result, *call.optional("bias")], call.shape)


def addmm(call: Call) -> Value:
    product = _product(call, call.value("mat1", "batch1"), call.value("mat2", "batch2"), call.shape)
    return call.rules.elementwise([product, *call.optional("self")], call.shape)


def matmul(call: Call) -> Value:
    return _product(call, call.value("self", "input"), call.value("other", "mat2", "tensor2"), call.shape)


def _product(call: Call, left: Value, right: Value, shape: Shape) -> Value:
    """Contract the last dim of the left operand with the second-last dim of the right one, as matmul does."""
    batch = _letters(max(len(left.shape), len(right.shape)) - 2)
    lead = "" if len(left.shape) == 1 else batch[len(batch) - (len(left.shape) - 2) :] + "x"
    tail = "" if len(right.shape) == 1 else "z"
    second = "y" if not tail else batch[len(batch) - (len(right.shape) - 2) :] + "yz"
    result = batch * (len(shape) > 2 or len(batch) == 0) + ("x" if lead else "") + tail
    return contract(call.rules.constraints, call.rules.name, left, right, (lead + "y", second, result), shape)


def einsum(call: Call) -> Value:
    text, operands = str(call.arguments["equation"]).replace(" ", ""), call.values
    inputs, _, result = text.partition("->")
    if len(operands) != 2 or "." in text or not result:
        call.rules.fix(operands, f"{call.rules.name} is an einsum that is not analyzed")
        return Value(call.shape)
    left, right = inputs.split(",")
    return contract(
        call.rules.constraints, call.rules.name, operands[0], operands[1], (left, right, result), call.shape
    )


def attention(call: Call) -> Value:
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


def convolution(call: Call) -> Value:
    """Contract channels within groups; positions mix."""
    x, weight = call.value("input"), call.value("weight")
    is_transposed = bool(call.arguments.get("transposed")) or "transpose" in call.name
    groups = cast(int, call.arguments.get("groups", 1))
    dims = len(weight.shape) - 2
    batch = "n" * (len(x.shape) - dims - 1)
    x = call.rules.pooled(x, x.shape[: len(batch) + 1] + (1,) * dims, range(len(batch) + 1, len(x.shape)))
    weight = call.rules.pooled(weight, weight.shape[:2] + (1,) * dims, range(2, dims + 2))
    left = viewed(x, (*x.shape[: len(batch)], groups, -1))
    right = viewed(weight, (groups, -1, weight.shape[1]))
    shape = (*x.shape[: len(batch)], groups, call.shape[len(batch)] // groups)
    equation = (batch + "gi", "gio" if is_transposed else "goi", batch + "go")
    product = contract(call.rules.constraints, call.rules.name, left, right, equation, shape)
    flat = viewed(product, (*shape[: len(batch)], -1, *(1,) * dims))
    result = Value(call.shape, flat.labels)
    return call.rules.elementwise([result, *as_channels(call, dims, "bias")], call.shape)


def _letters(count: int) -> str:
    return "abcdefgh"[:count]
