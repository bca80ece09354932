"""The whole model's graph as the page draws it: operators with the modules that hold them, and the edges between."""

from collections.abc import Callable, Iterable

from torch import fx

from nmcompile.ir.captured import WholeGraph
from nmcompile.report.layers import LayerReport


def graph_data(whole: WholeGraph | None, layers: Iterable[LayerReport]) -> dict[str, object]:
    """Return `nodes` and `edges` (pairs of places in `nodes`); without a whole graph, the layers without edges.

    Nodes of constants are left out: parameters, buffers, and what only they lead to.
    """
    if whole is None:
        return {"nodes": [_lonely(layer) for layer in layers], "edges": []}
    shown = _live(whole)
    place = {node: number for number, node in enumerate(shown)}
    edges = [(place[one], place[node]) for node in shown for one in node.all_input_nodes if one in place]
    return {"nodes": [_node(whole, node) for node in shown], "edges": edges}


def _live(whole: WholeGraph) -> list[fx.Node]:
    """Return the nodes that compute with an input of the model, and the inputs, in the order of the graph."""
    live: dict[fx.Node, None] = {}
    for node in whole.graph.nodes:
        is_input = node.op == "placeholder" and node.name not in whole.constants and bool(node.users)
        if is_input or any(one in live for one in node.all_input_nodes):
            live[node] = None
    return list(live)


def _node(whole: WholeGraph, node: fx.Node) -> dict[str, object]:
    return {
        "label": node.name if node.op == "placeholder" else _label(node.target),
        "module": whole.modules.get(node, ""),
        "layers": list(whole.layers.get(node, ())),
        "shape": ", ".join("×".join(map(str, shape)) for shape in whole.shapes.get(node, ())),
    }


def _label(target: str | Callable[..., object]) -> str:
    """Return the short name of an operator, or the last part of a module's or a method's name."""
    if isinstance(target, str):
        return target.rpartition(".")[2]
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def _lonely(layer: LayerReport) -> dict[str, object]:
    return {"label": layer.layer.kind, "module": layer.name, "layers": [layer.name], "shape": ""}
