"""The nodes that a value of a graph is computed from."""

from torch import fx


def expression_of(weight: fx.Node) -> list[fx.Node]:
    """The nodes that a weight is computed from, in graph order, itself last."""
    seen: set[fx.Node] = set()
    stack = [weight]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(seen)
