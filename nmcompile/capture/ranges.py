"""Nodes of a graph that are proven non-negative, from the operators alone."""

from collections.abc import Callable, Iterable

from torch import fx, nn
from torch.fx.node import Argument

from nmcompile.capture.names import is_torch_nn, operator_name, own_class
from nmcompile.capture.shared_memory import SharedMemory
from nmcompile.capture.writes import is_torch_function, written

# Names are compared without underscores and in lower case: one entry covers nn.AdaptiveAvgPool2d,
# F.adaptive_avg_pool2d, Tensor methods and ATen operators.
ALWAYS = {
    "relu", "relu6", "sigmoid", "logsigmoidbackward", "softmax", "softmax2d", "hardsigmoid", "abs", "absolute",
    "square", "exp", "softplus", "sqrt", "rsqrt",
}  # fmt: skip
KEEPS = {
    "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "featuredropout", "flatten", "unflatten", "view",
    "reshape", "permute", "transpose", "t", "contiguous", "squeeze", "unsqueeze", "getitem", "chunk", "split",
    "splitwithsizes", "unbind", "select", "slice", "narrow", "cat", "concat", "concatenate", "stack", "add", "iadd",
    "mul", "imul", "expand", "expandas", "repeat", "clone", "alias", "detach", "to", "tocopy", "float", "half",
    "bfloat16", "double", "typeas", "movedim", "swapaxes", "viewas", "reshapeas", "liftfreshcopy", "mean", "sum",
    "pixelshuffle", "pixelunshuffle", "channelshuffle", "upsamplenearest2d", "maximum", "zeropad1d", "zeropad2d",
    "zeropad3d", "reflectionpad1d", "reflectionpad2d", "reflectionpad3d", "replicationpad1d", "replicationpad2d",
    "replicationpad3d",
    *(f"{kind}pool{dims}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg") for dims in (1, 2, 3)),
    *(f"{kind}pool{dims}dwithindices" for kind in ("max", "adaptivemax") for dims in (1, 2, 3)),
}  # fmt: skip


def nonnegative_nodes(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose every element is at least 0 whatever the inputs are, and stays so.

    A node also returns the memory that it writes in place. A proven operator therefore leaves this memory proven. Any
    other operator removes the proof from every node that may share this memory, before the write and after.
    """
    proven, memory = set[fx.Node](), SharedMemory(model)
    for node in graph.nodes:
        memory.add(node, plain_name(model, node))
        if _is_nonnegative(model, node, proven):
            proven.add(node)
        else:
            proven -= memory.behind(written(model, node))
    return proven


def is_nonnegative(value: object, proven: set[fx.Node]) -> bool:
    """Return whether an argument is proven: a node, a number, or a sequence of these."""
    if isinstance(value, fx.Node):
        return value in proven
    if isinstance(value, tuple | list):
        return bool(value) and all(is_nonnegative(item, proven) for item in value)
    return isinstance(value, int | float) and value >= 0


def plain_name(model: nn.Module, node: fx.Node) -> str:
    """Return the operator of a node as named in the sets above; `""` if torch does not define it."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        name = own_class(module).__name__ if is_torch_nn(module) else ""
    else:
        is_known = node.op == "call_method" or (node.op == "call_function" and is_torch_function(node.target))
        name = operator_name(node) if is_known else ""
    return name.replace("_", "").lower()


def _is_nonnegative(model: nn.Module, node: fx.Node, proven: set[fx.Node]) -> bool:
    name = plain_name(model, node)
    bounds = _Bounds(node, model.get_submodule(str(node.target)) if node.op == "call_module" else None)
    if name in ALWAYS:
        return True
    if name in ("mul", "imul") and len(node.args) > 1 and node.args[0] is node.args[1]:
        return isinstance(node.args[0], fx.Node)
    if name in KEEPS:
        return all(is_nonnegative(value, proven) for value in _operands(name, node))
    rule = RULES.get(name)
    return rule is not None and rule(bounds, proven)


def _operands(name: str, node: fx.Node) -> Iterable[Argument]:
    """Return the arguments that hold values; the others hold shapes, dims and indices."""
    if name in ("add", "iadd", "mul", "imul", "maximum"):
        factors = [node.kwargs[key] for key in ("other", "alpha") if key in node.kwargs]
        return [*node.args, *factors]
    if name in ("cat", "concat", "concatenate", "stack"):
        return [node.args[0] if node.args else node.kwargs.get("tensors")]
    return [node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))]


class _Bounds:
    """A reader of numbers that a function takes as an argument and a module stores as an attribute."""

    def __init__(self, node: fx.Node, module: nn.Module | None) -> None:
        self.node = node
        self.module = module

    def number(self, name: str, position: int, default: object = None) -> object:
        if self.module is not None:
            return getattr(self.module, name, default)
        return self.node.kwargs.get(name, self.node.args[position] if len(self.node.args) > position else default)

    def keeps(self, proven: set[fx.Node]) -> bool:
        return is_nonnegative(self.node.args[0] if self.node.args else self.node.kwargs.get("input"), proven)


def _at_least(name: str, position: int, default: object = None) -> Callable[[_Bounds, set[fx.Node]], bool]:
    def rule(bounds: _Bounds, proven: set[fx.Node]) -> bool:
        low = bounds.number(name, position, default)
        return (isinstance(low, int | float) and low >= 0) or (low is None and bounds.keeps(proven))

    return rule


def _padded(bounds: _Bounds, proven: set[fx.Node]) -> bool:
    fill = bounds.number("value", 3, 0)
    if bounds.number("mode", 2, "constant") != "constant":
        fill = 0
    return bounds.keeps(proven) and (fill is None or (isinstance(fill, int | float) and fill >= 0))


def _constant_padded(bounds: _Bounds, proven: set[fx.Node]) -> bool:
    return bounds.keeps(proven) and is_nonnegative(bounds.number("value", 2, 0) or 0, proven)


def _powered(bounds: _Bounds, proven: set[fx.Node]) -> bool:
    exponent = bounds.number("exponent", 1)
    return bounds.keeps(proven) or (isinstance(exponent, int) and exponent % 2 == 0)


def _scaled(bounds: _Bounds, proven: set[fx.Node]) -> bool:
    return bounds.keeps(proven) and is_nonnegative(bounds.number("other", 1), proven)


def _thresholded(bounds: _Bounds, proven: set[fx.Node]) -> bool:
    low, value = bounds.number("threshold", 1), bounds.number("value", 2)
    return is_nonnegative(value, proven) and (bounds.keeps(proven) or is_nonnegative(low, proven))


RULES: dict[str, Callable[[_Bounds, set[fx.Node]], bool]] = {
    "clamp": _at_least("min", 1),
    "clip": _at_least("min", 1),
    "clampmin": _at_least("min", 1),
    "hardtanh": _at_least("min_val", 1, -1.0),
    "pad": _padded,
    "constantpadnd": _constant_padded,
    "constantpad1d": _padded,
    "constantpad2d": _padded,
    "constantpad3d": _padded,
    "threshold": _thresholded,
    "pow": _powered,
    "ipow": _powered,
    "div": _scaled,
    "truediv": _scaled,
    "itruediv": _scaled,
}
