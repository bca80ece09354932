"""Memory that nodes of a graph may share or write to: fx and torch.export preserve in-place operations."""

import inspect
import types
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from nmcompile.capture.names import is_torch_nn
from nmcompile.capture.sites import is_attention, is_layer
from nmcompile.ir.calls import linear_in_out

ORIGINS = {"torch", "_operator", "builtins", "math"}


def is_torch_function(target: Any) -> bool:
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


def _only_reads(module: nn.Module) -> bool:
    if is_layer(module) or is_attention(module):
        return True
    return all(is_torch_nn(one) and not getattr(one, "inplace", False) for one in module.modules())


def _is_inplace(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", ""))
    return name in AUGMENTED or name in ("setitem", "setattr") or name.endswith("_") or bool(_argument(node, "inplace"))


def _argument(node: fx.Node, name: str) -> Any:
    if name in node.kwargs or not isinstance(node.target, types.FunctionType):
        return node.kwargs.get(name)
    names = list(inspect.signature(node.target).parameters)
    return dict(zip(names, node.args, strict=False)).get(name)


def _first(node: fx.Node) -> list[fx.Node]:
    return _nodes(node.args[0]) if node.args else node.all_input_nodes


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


# Names as in `ranges`. Operators not listed here, above all views, may return the memory of any input.
FRESH = {
    "linear", "linearinout", "addmm", "mm", "bmm", "baddbmm", "matmul", "conv1d", "conv2d", "conv3d", "convolution",
    "embedding",
    "convtranspose1d", "convtranspose2d", "convtranspose3d", "scaleddotproductattention", "batchnorm", "syncbatchnorm",
    "layernorm", "groupnorm", "rmsnorm", "localresponsenorm", "add", "iadd", "sub", "isub", "rsub", "mul", "imul",
    "div", "truediv", "itruediv", "neg", "pow", "ipow", "abs", "absolute", "square", "exp", "log", "sqrt", "rsqrt",
    "sigmoid", "tanh", "relu", "relu6", "gelu", "silu", "elu", "celu", "selu", "mish", "leakyrelu", "prelu",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "logsigmoid", "clamp", "clip", "clampmin",
    "clampmax", "maximum", "minimum", "where", "maskedfill", "copy", "fill", "zero", "softmax", "softmax2d",
    "logsoftmax", "mean", "sum", "cat", "concat", "concatenate", "stack", "clone", "repeat", "interpolate", "upsample",
    "upsamplenearest2d", "upsamplebilinear2d", "pad", "constantpadnd", "eq", "ne", "lt", "le", "gt", "ge", "size",
    "dim", "numel", "symsize",
    *(f"{kind}norm{dims}d" for kind in ("batch", "instance") for dims in (1, 2, 3)),
    *(f"{kind}pad{dims}d" for kind in ("zero", "constant", "reflection", "replication") for dims in (1, 2, 3)),
    *(f"{kind}pool{dims}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for dims in (1, 2, 3)),
}  # fmt: skip
"""Operators whose result is new memory or, in place, the memory that they write to."""


class SharedMemory:
    """Sets of nodes that may share memory, grown in graph order."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.groups: dict[fx.Node, set[fx.Node]] = {}
        self.attributes: dict[str, fx.Node] = {}

    def add(self, node: fx.Node, name: str) -> None:
        """Add the next node; `name` is the name of its operator, as in `FRESH`."""
        group = self.groups[node] = {node}
        for other in self._sources(node, name):
            small, large = sorted((group, self.groups[other]), key=len)
            if small is not large:
                large |= small
                self.groups.update(dict.fromkeys(small, large))
            group = large

    def behind(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return every node that may share memory with one of `nodes`."""
        return set[fx.Node]().union(*(self.groups[node] for node in nodes))

    def _sources(self, node: fx.Node, name: str) -> list[fx.Node]:
        if node.op == "get_attr":
            return [self.attributes.setdefault(str(node.target), node)]
        is_layer_call = node.op == "call_module" and is_layer(self.model.get_submodule(str(node.target)))
        return written(self.model, node) if name in FRESH or is_layer_call else node.all_input_nodes


AUGMENTED = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv",
    "ixor",
}  # fmt: skip
"""Methods that Python calls for `x += y` and its like."""


def written_arguments(function: OpOverload, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operator writes to, by its schema."""
    arguments = function._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    return [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def storage_key(tensor: Tensor) -> int:
    """Return a key that identifies a tensor's storage; views of one tensor have the same key."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):
        return id(tensor)
