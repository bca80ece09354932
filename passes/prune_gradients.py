"""Prune the gradient of the backward GEMM (SDGP) and of the update GEMM (MVUE).

gemm_update(grad_output, input)  ->  gemm_update(prune(grad_output, "mvue", 2, 4, "auto", 1, key), input)
"""

from dataclasses import dataclass
from typing import ClassVar

from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.plan import PlanRow
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.passes.rewriting import placeholder, prune_operand
from nmcompile.pruning.references import OPERATORS


@dataclass(frozen=True)
class PruneGradients:
    """A pass that puts the planned operator before dY. The bias gradient still reads the unpruned dY.

    Random operators take a `key` placeholder, for which the layer's random stream draws a new key in each backward
    call.
    """

    name: ClassVar[str] = "prune-gradients"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            for phase in (Phase.BACKWARD, Phase.UPDATE):
                if row := three.plan.find(phase, "grad_output"):
                    _prune_gradient(three, phase, row)


def _prune_gradient(three: ThreeGraphs, phase: Phase, row: PlanRow) -> None:
    graph = three[phase].graph
    assert row.pattern is not None and row.operator is not None
    axis = "channels" if row.axis == "out" else row.axis
    options = row.operator, row.pattern.n_keep, row.pattern.block, axis, three.layer.channel_dim
    dense = placeholder(graph, "grad_output")
    key = (placeholder(graph, "key"),) if OPERATORS[row.operator].needs_key else ()
    args = (dense, *options, *key)
    meta = NodeMeta("prune", three.layer, phase, row)
    prune_operand(three, meta, "grad_output", "grad_output_pruned", ops.prune, args)
    three[phase].recompile()
