"""Rules that every three-GEMM graph keeps between passes; tests check them after each pass."""

from collections.abc import Iterator

from torch import fx

from nmcompile.arguments import Args
from nmcompile.config import Phase
from nmcompile.errors import PostconditionError
from nmcompile.ir import operations as ops
from nmcompile.ir.graph_results import results_of
from nmcompile.ir.node_meta import find_meta, kind_of, nodes_of_kind, row_of
from nmcompile.ir.plan import READ, Operand, PlanRow
from nmcompile.ir.program import Program, ThreeGraphs

Operands = tuple[Operand, ...]
CALLER = {"input", "weight", "bias", "weight_mask", "weight_step", "input_step", "output_step"}
PRUNED: dict[str, Operands] = {"expand-gemms": (), "prune-weights": ("weight",), "prune-inputs": ("weight", "input")}
"""Operands that are pruned after a pass has run; after every later pass all are."""
BEFORE = ("expand-gemms", "prune-weights", "prune-inputs", "prune-gradients")
QUANTIZED: dict[str, Operands] = dict.fromkeys(BEFORE, ()) | {"quantize-weights": ("weight",)}
"""Operands that are quantized after a pass has run, likewise."""
BIASES = ("quantize-biases", "quantize-outputs", "lower-nodes")
"""Passes after which the biases are rounded too."""
OUTPUTS = ("quantize-outputs", "lower-nodes")
"""Passes after which the outputs are pruned and quantized too."""
READS: dict[Phase, Operands] = {Phase.FORWARD: ("weight", "input"), Phase.BACKWARD: ("weight",), Phase.UPDATE: ()}
"""Operands that the GEMM of each phase quantizes itself; the update GEMM gets the quantized input."""


def verify_graphs(program: Program, after: str) -> None:
    """Check every graph of a program.

    1. fx's own lint passes, and every call node carries a `NodeMeta` of its layer and phase.
    2. There is exactly one GEMM in each graph.
    3. A placeholder of forward comes from the caller; one of backward or update is `grad_output`, `key`, an operand of
       forward, or a value that forward saved.
    4. Forward returns its output and the saved values; backward dX and, with a quantized input or output, the gradient
       of its step; update dW and, with a bias, db.
    5. The GEMM reads, and forward returns, through prune and quantize nodes exactly what the plan prunes and quantizes,
       with the planned operator, pattern and axis, or grid; and a bias is rounded exactly where the plan says so.

    Args:
        program: with its graphs expanded; one without passes.
        after: name of the pass that ran last.

    Raises:
        PostconditionError: naming the pass, the layer, the graph and the rule.
    """
    for three in program.layers.values():
        for phase, module in three:
            problem = _problem(three, phase, module.graph) or _plan_problem(three, phase, module.graph, after)
            if problem:
                raise PostconditionError(f"after {after}: layer {three.layer.name!r}, {phase.value} graph: {problem}")


def _problem(three: ThreeGraphs, phase: Phase, graph: fx.Graph) -> str:
    try:
        graph.lint()
    except RuntimeError as error:
        return f"fx's lint fails: {error}"
    calls = [node for node in graph.nodes if node.op == "call_function"]
    strange = [node.name for node in calls if not _belongs(node, three, phase)]
    if strange:
        return f"node {strange[0]!r} carries no NodeMeta of this layer and phase"
    gemms = sum(kind_of(node) == "gemm" for node in calls)
    if gemms != 1:
        return f"{gemms} GEMM nodes, expected 1"
    known = CALLER if phase is Phase.FORWARD else CALLER | {"grad_output", "key", *three.saved}
    unknown = [node.name for node in graph.nodes if node.op == "placeholder" and node.target not in known]
    if unknown:
        return f"nothing provides placeholder {unknown[0]!r}"
    expected = {
        Phase.FORWARD: 1 + len(three.saved),
        Phase.BACKWARD: 1 + ("input_beyond" in three.saved) + ("output_beyond" in three.saved),
        Phase.UPDATE: 1 + three.layer.has_bias,
    }[phase]
    returned = len(results_of(graph))
    return "" if returned == expected else f"{returned} outputs, expected {expected}"


def _belongs(node: fx.Node, three: ThreeGraphs, phase: Phase) -> bool:
    meta = find_meta(node)
    return meta is not None and (meta.layer, meta.phase) == (three.layer, phase)


def _plan_problem(three: ThreeGraphs, phase: Phase, graph: fx.Graph, after: str) -> str:
    if phase is Phase.FORWARD:
        is_rounded = any(node.target is ops.to_accumulator for node in graph.nodes)
        if is_rounded != (three.plan.rounds_bias and after in BIASES):
            return f"its bias is {'' if is_rounded else 'not '}rounded, which is not what is planned"
    gemm = next(nodes_of_kind(graph, "gemm"))
    marked = _marked(gemm)
    if phase is Phase.FORWARD:
        marked += [node for node in _marked(results_of(graph)[0]) if node not in marked]
    planned = set(_planned(three, phase, after))
    found = {row for node in marked if (row := row_of(node)) is not None}
    for row in planned - found:
        return f"the GEMM does not read what is planned: {row}"
    for row in found - planned:
        return f"the GEMM reads what is not planned: {row}"
    for node in marked:
        row = row_of(node)
        if row is not None and _options(node) not in (None, _planned_options(row)):
            return f"node {node.name!r} is not what is planned: {row}"
    return ""


def _planned(three: ThreeGraphs, phase: Phase, after: str) -> Iterator[PlanRow]:
    pruned, quantized = PRUNED.get(after, READ), QUANTIZED.get(after, READ)
    yield from (row for row in three.plan.rows_of(phase) if row.is_sparse and row.operand in pruned)
    grids = (three.plan.grid_row(operand) for operand in READS[phase] if operand in quantized)
    yield from (row for row in grids if row is not None)
    if after in OUTPUTS and not three.plan.norm:
        yield from (row for row in three.plan.rows_of(phase) if row.operand == "output")


def _marked(node: fx.Node) -> list[fx.Node]:
    """Return the prune and quantize nodes that a node depends on, itself included."""
    return [n for n in {node, *_sources(node)} if kind_of(n) in ("prune", "quantize")]


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return every node that `node` depends on."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting.extend(new)
    return found


def _options(node: fx.Node) -> Args | None:
    """Return operator, N, M and axis, or bits and sign; None for masks and a backend's own nodes."""
    if node.target is ops.to_grid:
        return node.args[2:]
    if node.target is ops.prune:
        return node.args[1:5]
    return (*node.args[1:4], "channels") if node.target is ops.prune_mask else None


def _planned_options(row: PlanRow) -> Args:
    if row.grid is not None:
        return row.grid.bits, row.grid.signed
    assert row.pattern is not None
    axis = "channels" if row.axis in ("in", "out") else row.axis
    return row.operator, row.pattern.n_keep, row.pattern.block, axis
