"""Helpers of the pruning and quantization passes: placeholders, and a node inserted before a GEMM's operand."""

from torch import fx
from torch.fx.node import Argument, Target

from nmcompile.config import Phase
from nmcompile.errors import PreconditionError
from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import NodeMeta, kind_of
from nmcompile.ir.plan import Operand, PlanRow
from nmcompile.ir.program import ThreeGraphs

GEMMS = (ops.gemm_forward, ops.gemm_backward, ops.gemm_update)


def gemm_node(three: ThreeGraphs, phase: Phase) -> fx.Node:
    """Return the only GEMM of a graph that is not lowered yet."""
    found = [node for node in three[phase].graph.nodes if node.target in GEMMS]
    if len(found) != 1:
        raise PreconditionError(
            f"layer {three.layer.name!r}: its {phase.value} graph has {len(found)} GEMM nodes that are not lowered, "
            "expected 1; run the pruning passes after expand-gemms and before lower-nodes"
        )
    gemm: fx.Node = found[0]
    return gemm


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Return the placeholder of that name, made after the others if it does not exist."""
    existing: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    for node in existing:
        if node.target == name:
            return node
    with graph.inserting_after(existing[-1]):
        return graph.placeholder(name)


def prune_operand(
    three: ThreeGraphs, meta: NodeMeta, operand: Operand, name: str, target: Target, args: tuple[Argument, ...]
) -> fx.Node:
    """Insert `target(*args)` before the GEMM in place of the placeholder `operand` among the GEMM's arguments."""
    graph, gemm = three[meta.phase].graph, gemm_node(three, meta.phase)
    dense = placeholder(graph, operand)
    if dense not in gemm.all_input_nodes:
        raise PreconditionError(
            f"layer {three.layer.name!r}: the GEMM of its {meta.phase.value} graph does not read the dense {operand}; "
            "run each pruning pass once"
        )
    with graph.inserting_before(gemm):
        pruned = ops.add_node(graph, meta, name, target, args)
    gemm.replace_input_with(dense, pruned)
    return pruned


def quantize_operand(three: ThreeGraphs, phase: Phase, operand: Operand, row: PlanRow) -> tuple[fx.Node, fx.Node]:
    """Put the GEMM's `operand`, pruned or not, on its grid; return it as before and as quantized."""
    gemm = gemm_node(three, phase)
    position = ("input", "weight").index(operand) if phase is Phase.FORWARD else 1
    before = gemm.args[position]
    assert isinstance(before, fx.Node) and row.grid is not None
    if kind_of(before) == "quantize":
        raise PreconditionError(
            f"layer {three.layer.name!r}: the GEMM of its {phase.value} graph reads a quantized {operand} already; run "
            "each quantization pass once"
        )
    graph = three[phase].graph
    args = before, placeholder(graph, f"{operand}_step"), row.grid.bits, row.grid.signed
    with graph.inserting_before(gemm):
        meta = NodeMeta("quantize", three.layer, phase, row)
        after = ops.add_node(graph, meta, f"{operand}_quantized", ops.to_grid, args)
    gemm.update_arg(position, after)
    return before, after


def rank_on_grid(three: ThreeGraphs, pruned: fx.Node, operand: Operand, row: PlanRow) -> None:
    """Let the mask of a pruned activation be that of its integers: a runtime prunes these, and has nothing else."""
    if pruned.target is not ops.apply_mask:
        return
    graph, (dense, mask) = pruned.graph, pruned.args
    assert isinstance(mask, fx.Node) and row.grid is not None
    args = dense, placeholder(graph, f"{operand}_step"), row.grid.bits, row.grid.signed
    with graph.inserting_before(mask):
        meta = NodeMeta("view", three.layer, Phase.FORWARD, row)
        ranked = ops.add_node(graph, meta, f"{operand}_ranked", ops.to_grid, args)
    mask.update_arg(0, ranked)
