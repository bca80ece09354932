"""The nodes that a value of a graph is computed from, and the value."""

from collections.abc import Callable

from torch import Tensor, fx, nn
from torch.fx.node import Argument


def expression_of(weight: fx.Node) -> list[fx.Node]:
    """Return the nodes that a weight is computed from, in graph order, itself last."""
    seen: set[fx.Node] = set()
    stack = [weight]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(seen)


def value_of(weight: fx.Node, attribute: Callable[[str], Argument], submodule: Callable[[str], nn.Module]) -> Tensor:
    """Compute a weight from attributes and with submodules, both given by name."""
    values: dict[fx.Node, Argument] = {}
    for node in expression_of(weight):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            values[node] = attribute(str(node.target))
        elif node.op == "call_module":
            values[node] = submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
    result = values[weight]
    assert isinstance(result, Tensor)
    return result
