"""Graphs as text, and the whole model's graph with its layers expanded."""

from torch import fx

from nmcompile.config import Phase
from nmcompile.custom_op import shown_name
from nmcompile.ir.graph_results import results_of
from nmcompile.ir.node_meta import NodeMeta, meta_of
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.printable import printable

LONGEST_LINE = 1000  # characters


def format_three_graphs(three: ThreeGraphs) -> str:
    """Format one node per line: its name, kind, target with arguments, and its part of the plan."""
    return "\n".join(_format(phase, module.graph) for phase, module in three)


def _format(phase: Phase, graph: fx.Graph) -> str:
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    lines = [f"{phase.value}({', '.join(names)}) -> {', '.join(str(node) for node in results_of(graph))}"]
    for node in graph.nodes:
        if node.op == "call_function":
            meta = meta_of(node)
            call = f"{shown_name(node.target)}({_arguments(node, meta)})"
            lines.append(f"  {node.name:<20} {meta.kind:<6} {call}" + (f"    # {meta.planned}" if meta.planned else ""))
    return "\n".join(printable(line, LONGEST_LINE) for line in lines)


def _arguments(node: fx.Node, meta: NodeMeta) -> str:
    """Format the arguments without the name of the node's slot, which differs between equal graphs."""
    shown = (one for one in node.args if meta.choice is None or one != meta.choice.name)
    return ", ".join(map(str, shown))


def inline_forward(program: Program) -> fx.Graph | None:
    """Return the whole graph with each rewritten layer replaced by the nodes of its forward graph.

    Nodes that hold several layers (attention) stay one call.
    """
    whole = program.captured.whole
    if whole is None:
        return None
    rewritten = {plan.layer.name for plan in program.plan if plan.rewritten}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in whole.graph.nodes:
        names = whole.layers.get(node, ())
        if len(names) == 1 and names[0] in rewritten and node.op in ("call_module", "call_function"):
            copies[node] = _inline(graph, program, names[0], node, copies)
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph


def _inline(graph: fx.Graph, program: Program, name: str, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    site = program.site(name)
    forward = program.layers[name][Phase.FORWARD].graph
    prefix = site.weight.rpartition(".")[0]
    targets = {"weight": site.weight, "weight_mask": f"{site.weight}_mask", "bias": f"{prefix}.bias".lstrip(".")}
    inner: dict[fx.Node, fx.Node] = {}
    source = next(n for n in node.all_input_nodes if n.op != "get_attr")
    for step in forward.nodes:
        if step.op == "placeholder":
            operand = str(step.target)
            target = targets.get(operand, f"{name}.{operand}".lstrip("."))
            inner[step] = copies[source] if operand == "input" else graph.create_node("get_attr", target)
        elif step.op != "output":
            inner[step] = graph.node_copy(step, lambda n: inner[n])
    return inner[results_of(forward)[0]]
