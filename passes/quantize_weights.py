"""Put the weight of the forward and backward GEMM on its grid.

gemm_forward(input, weight_pruned)         ->  gemm_forward(input, to_grid(weight_pruned, weight_step, bits))
gemm_backward(grad_output, weight_pruned)  ->  gemm_backward(grad_output, to_grid(weight_pruned, weight_step, bits))
"""

from dataclasses import dataclass
from typing import ClassVar

from nmcompile.config import Phase
from nmcompile.ir.program import Program
from nmcompile.passes.rewriting import quantize_operand


@dataclass(frozen=True)
class QuantizeWeights:
    """A pass that quantizes W, pruned or not, wherever a GEMM reads it; dW passes straight through to the dense weight.

    The step comes from outside the graph: it is SAWB's of the dense weight, as masking would distort its statistics.
    """

    name: ClassVar[str] = "quantize-weights"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            if row := three.plan.grid_row("weight"):
                for phase in (Phase.FORWARD, Phase.BACKWARD):
                    quantize_operand(three, phase, "weight", row)
                    three[phase].recompile()
