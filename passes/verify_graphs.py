"""The rules that every three-GEMM graph keeps between passes; tests run it after each of them."""

from torch import fx

from nmcompile.config import Phase
from nmcompile.errors import PostconditionError
from nmcompile.ir.operations import KINDS
from nmcompile.ir.program import Program, ThreeGraphs

CALLER = {"input", "weight", "bias", "weight_mask"}


def verify_graphs(program: Program, after: str) -> None:
    """Check every graph of a program.

    1. fx's own lint passes, and every call node says what kind it is and of which layer.
    2. There is exactly one GEMM in each graph.
    3. A placeholder of forward comes from the caller; one of backward or update is `grad_output`, `key`, something
       that forward was given, or something that forward saved.
    4. Forward returns its output and what it saved; backward one gradient; update dW and, with a bias, db.

    Args:
        program: with its graphs expanded; one without passes.
        after: name of the pass that ran last, for the message.

    Raises:
        PostconditionError: naming the pass, the layer and the rule.
    """
    for three in program.layers.values():
        for phase, module in three:
            problem = _problem(three, phase, module.graph)
            if problem:
                raise PostconditionError(f"after {after}: layer {three.layer.name!r}, {phase.value} graph: {problem}")


def _problem(three: ThreeGraphs, phase: Phase, graph: fx.Graph) -> str:
    graph.lint()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    unmarked = [node.name for node in calls if node.meta.get("kind") not in KINDS or "layer" not in node.meta]
    if unmarked:
        return f"node {unmarked[0]!r} has no kind or layer"
    gemms = sum(node.meta["kind"] == "gemm" for node in calls)
    if gemms != 1:
        return f"{gemms} GEMM nodes, expected 1"
    known = CALLER if phase is Phase.FORWARD else CALLER | {"grad_output", "key", *three.saved}
    unknown = [node.name for node in graph.nodes if node.op == "placeholder" and node.target not in known]
    if unknown:
        return f"nothing provides placeholder {unknown[0]!r}"
    expected = {Phase.FORWARD: 1 + len(three.saved), Phase.BACKWARD: 1, Phase.UPDATE: 1 + three.layer.has_bias}[phase]
    returned = len(graph.output_node().args[0])  # type: ignore[arg-type]
    return "" if returned == expected else f"{returned} outputs, expected {expected}"
