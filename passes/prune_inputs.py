"""Prune the input of the forward GEMM (the paper's sparse activations).

gemm_forward(input, weight)      ->  input_mask = prune_mask(input); gemm_forward(apply_mask(input, input_mask), ...)
gemm_update(grad_output, input)  ->  gemm_update(grad_output, input_pruned)
dX = gemm_backward(...)          ->  apply_mask(gemm_backward(...), input_mask)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.graph_results import results_of, set_results
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.plan import PlanRow
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.passes.rewriting import gemm_node, placeholder, prune_operand


@dataclass(frozen=True)
class PruneInputs:
    """A pass that prunes X per sample along its channels; the gradients share X's mask (§7 of the paper).

    Forward passes on the pruned input and its mask, so the dense input need not be kept for this layer.
    """

    name: ClassVar[str] = "prune-inputs"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            if row := three.plan.find(Phase.FORWARD, "input"):
                _prune_forward(three, row)
                _mask_gradient(three)
                _rename_input(three, Phase.BACKWARD)
                _rename_input(three, Phase.UPDATE)


def _prune_forward(three: ThreeGraphs, row: PlanRow) -> None:
    graph = three[Phase.FORWARD].graph
    assert row.pattern is not None
    dense, meta = placeholder(graph, "input"), NodeMeta("prune", three.layer, Phase.FORWARD, row)
    args = dense, row.operator, row.pattern.n_keep, row.pattern.block, three.layer.channel_dim
    with graph.inserting_before(gemm_node(three, Phase.FORWARD)):
        mask = ops.add_node(graph, meta, "input_mask", ops.prune_mask, args)
    masked = (dense, mask)
    pruned = prune_operand(three, replace(meta, kind="view"), "input", "input_pruned", ops.apply_mask, masked)
    set_results(graph, [*results_of(graph), pruned, mask])
    three.saved = (*three.saved, "input_pruned", "input_mask")
    three[Phase.FORWARD].recompile()


def _mask_gradient(three: ThreeGraphs) -> None:
    graph, gemm = three[Phase.BACKWARD].graph, gemm_node(three, Phase.BACKWARD)
    mask, meta = placeholder(graph, "input_mask"), NodeMeta("view", three.layer, Phase.BACKWARD)
    with graph.inserting_after(gemm):
        masked = ops.add_node(graph, meta, "grad_input_masked", ops.apply_mask, (gemm, mask))
    gemm.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
    three[Phase.BACKWARD].recompile()


def _rename_input(three: ThreeGraphs, phase: Phase) -> None:
    graph = three[phase].graph
    for dense in [node for node in graph.nodes if node.op == "placeholder" and node.target == "input"]:
        dense.replace_all_uses_with(placeholder(graph, "input_pruned"))
        graph.erase_node(dense)
    three[phase].recompile()
