"""Prune the weight of the forward and backward GEMM with its current mask.

gemm_forward(input, weight)         ->  gemm_forward(input, apply_mask(weight, weight_mask))
gemm_backward(grad_output, weight)  ->  gemm_backward(grad_output, apply_mask(weight, weight_mask))
"""

from dataclasses import dataclass
from typing import ClassVar

from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.passes.rewriting import placeholder, prune_operand


@dataclass(frozen=True)
class PruneWeights:
    """A pass that applies the mask to the weight of the forward and backward GEMM; the update GEMM does not read it.

    The backward GEMM is sparse only if the mask is transposable. With a row-wise mask it runs dense on the same masked
    weight, which is the derivative of the forward GEMM. The mask comes from outside the graph, since optimizer steps
    refresh it, and not calls.
    """

    name: ClassVar[str] = "prune-weights"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            if three.plan.find(Phase.FORWARD, "weight"):
                _mask_weight(three, Phase.FORWARD)
                _mask_weight(three, Phase.BACKWARD)


def _mask_weight(three: ThreeGraphs, phase: Phase) -> None:
    graph, row = three[phase].graph, three.plan.find(phase, "weight")
    args = placeholder(graph, "weight"), placeholder(graph, "weight_mask")
    meta = NodeMeta("prune" if row else "view", three.layer, phase, row)
    prune_operand(three, meta, "weight", "weight_pruned", ops.apply_mask, args)
    three[phase].recompile()
