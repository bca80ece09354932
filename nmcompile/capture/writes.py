"""Memory that a node of a graph may write to: fx and torch.export preserve in-place operations."""

import inspect
import types
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.node import Argument

from nmcompile.capture.names import is_torch_nn
from nmcompile.capture.sites import is_attention, is_layer
from nmcompile.ir.calls import linear_in_out

T = TypeVar("T")

ORIGINS = {"torch", "_operator", "builtins", "math"}
"""Modules whose functions do what their names say."""
AUGMENTED = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv",
    "ixor",
}  # fmt: skip
"""Methods that Python calls for `x += y` and its like."""


def is_torch_function(target: object) -> bool:
    """Return whether a function does what its name says: it is torch's or Python's, and runs no graph of its own."""
    if target is linear_in_out:
        return True
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims")
    if isinstance(target, OpOverloadPacket):
        return target.__module__ == "torch._ops.aten"
    origin = getattr(target, "__module__", None) or "torch"
    return origin.split(".")[0] in ORIGINS and not isinstance(target, HigherOrderOperator)


def written(model: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose memory a node may write to; all inputs if its code is unknown."""
    if node.op == "call_module":
        return [] if _only_reads(model.get_submodule(str(node.target))) else node.all_input_nodes
    if node.op == "call_method":
        return _first(node) if str(node.target).endswith("_") else _nodes(node.kwargs.get("out"))
    if node.op != "call_function":
        return []
    if isinstance(node.target, OpOverload):
        return _nodes(written_arguments(node.target, node.args, node.kwargs))
    if not is_torch_function(node.target):
        return node.all_input_nodes
    return [*(_first(node) if _is_inplace(node) else []), *_nodes(_argument(node, "out"))]


def written_arguments(function: OpOverload, args: Sequence[T], kwargs: Mapping[str, T]) -> list[T | None]:
    """Return the arguments that an operator writes to, by its schema."""
    arguments = function._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    return [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _only_reads(module: nn.Module) -> bool:
    if is_layer(module) or is_attention(module):
        return True
    return all(is_torch_nn(one) and not getattr(one, "inplace", False) for one in module.modules())


def _is_inplace(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", ""))
    return name in AUGMENTED or name in ("setitem", "setattr") or name.endswith("_") or bool(_argument(node, "inplace"))


def _argument(node: fx.Node, name: str) -> Argument:
    if name in node.kwargs or not isinstance(node.target, types.FunctionType):
        return node.kwargs.get(name)
    names = list(inspect.signature(node.target).parameters)
    return dict(zip(names, node.args, strict=False)).get(name)


def _first(node: fx.Node) -> list[fx.Node]:
    return _nodes(node.args[0]) if node.args else node.all_input_nodes


def _nodes(value: Argument) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found
