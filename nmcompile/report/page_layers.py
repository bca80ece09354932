"""The three graphs of each layer as the page draws them; equal graphs once."""

import json
from collections.abc import Iterable, Iterator, Mapping

from torch import fx

from nmcompile.config import Phase
from nmcompile.custom_op import shown_name
from nmcompile.ir.captured import WholeGraph
from nmcompile.ir.graph_results import results_of
from nmcompile.ir.layers import Layer
from nmcompile.ir.node_meta import find_meta
from nmcompile.ir.operations import apply_mask
from nmcompile.report.layers import LayerReport

Shape = tuple[int, ...]
RESULT: Mapping[Phase, str] = {Phase.FORWARD: "grad_output", Phase.BACKWARD: "input", Phase.UPDATE: "weight"}
"""The operand that has the shape of a GEMM's result."""


class GraphTable:
    """Graphs as data, each different one once; `number` returns the place of a layer's graphs."""

    def __init__(self) -> None:
        self.graphs: list[object] = []
        self._places: dict[str, int] = {}

    def number(self, layer: LayerReport, operands: Mapping[str, Shape]) -> int:
        shapes = dict(operands)
        data = {phase.value: _graph(layer.graphs[phase].graph, phase, shapes) for phase in Phase}
        text = json.dumps(data)
        if text not in self._places:
            self._places[text] = len(self.graphs)
            self.graphs.append(data)
        return self._places[text]


def operand_shapes(whole: WholeGraph | None, layers: Iterable[LayerReport]) -> dict[str, dict[str, Shape]]:
    """Return the shapes of each layer's operands by name; those of its input and output if an example ran."""
    shapes = {layer.name: _weight_shapes(layer.layer) for layer in layers}
    if whole is None:
        return shapes
    for node, names in whole.layers.items():
        if len(names) == 1 and names[0] in shapes:
            for operand, shape in _example_shapes(whole, node).items():
                shapes[names[0]].setdefault(operand, shape)
    return shapes


def _example_shapes(whole: WholeGraph, node: fx.Node) -> dict[str, Shape]:
    """Return the shapes of a layer's input and output where they are known."""
    source = next((one for one in node.all_input_nodes if one.op != "get_attr"), node)
    found = {"input": whole.shapes.get(source, ()), "grad_output": whole.shapes.get(node, ())}
    return {operand: shapes[0] for operand, shapes in found.items() if len(shapes) == 1}


def _weight_shapes(layer: Layer) -> dict[str, Shape]:
    weight = tuple(layer.weight_shape)
    return {"weight": weight, "weight_mask": weight, "bias": (layer.out_features,)}


def _graph(graph: fx.Graph, phase: Phase, shapes: dict[str, Shape]) -> dict[str, object]:
    """Return nodes and edges; add the shapes of results to `shapes`, under their names, for the graphs that follow."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    results = set(results_of(graph))
    place = {node: number for number, node in enumerate(nodes)}
    drawn = []
    for node in nodes:
        name = str(node.target) if node.op == "placeholder" else node.name
        shape = _shape(node, phase, shapes)
        if shape is not None:
            shapes[name] = shape
        drawn.append({"name": name, "result": node in results} | _described(node) | {"shape": list(shape or ())})
    edges = [(place[one], place[node]) for node in nodes for one in node.all_input_nodes]
    return {"nodes": drawn, "edges": edges}


def _described(node: fx.Node) -> dict[str, str]:
    meta = find_meta(node)
    if meta is None:
        return {"kind": "operand", "call": "", "planned": "", "backend": ""}
    planned = "" if meta.planned is None else str(meta.planned)
    return {"kind": meta.kind, "call": shown_name(node.target), "planned": planned, "backend": meta.backend}


def _shape(node: fx.Node, phase: Phase, shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape of a node's result where it follows from the node's kind."""
    meta = find_meta(node)
    if meta is None:
        return shapes.get(str(node.target))
    if meta.kind == "gemm":
        return shapes.get(RESULT[phase])
    if meta.kind in ("prune", "quantize") or node.target is apply_mask:
        return next((shapes[name] for name in _names(node) if name in shapes), None)
    return None


def _names(node: fx.Node) -> Iterator[str]:
    """Yield the names of the first argument."""
    for one in node.all_input_nodes[:1]:
        yield str(one.target) if one.op == "placeholder" else one.name
