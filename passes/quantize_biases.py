"""Round the bias of a layer whose weight and input are quantized to whole steps of its integer accumulator.

add_bias(gemm, bias)  ->  add_bias(gemm, to_accumulator(bias, input_step, weight_step))
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from nmcompile.config import Phase
from nmcompile.errors import PreconditionError
from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.passes.rewriting import gemm_node, placeholder


@dataclass(frozen=True)
class QuantizeBiases:
    """A pass that rounds biases, since integer kernels add an integer bias; db passes straight through."""

    name: ClassVar[str] = "quantize-biases"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            if three.plan.rounds_bias:
                _round_bias(three)


def _round_bias(three: ThreeGraphs) -> None:
    graph, gemm = three[Phase.FORWARD].graph, gemm_node(three, Phase.FORWARD)
    add = next(node for node in gemm.users if node.target is ops.add_bias)
    bias = add.args[1]
    if not isinstance(bias, fx.Node) or bias.target is ops.to_accumulator:
        raise PreconditionError(
            f"layer {three.layer.name!r}: the GEMM of its forward graph adds a rounded bias already; run each "
            "quantization pass once"
        )
    args = bias, placeholder(graph, "input_step"), placeholder(graph, "weight_step")
    with graph.inserting_before(gemm):  # a backend may fuse the bias into the GEMM
        meta = NodeMeta("view", three.layer, Phase.FORWARD)
        rounded = ops.add_node(graph, meta, "bias_rounded", ops.to_accumulator, args)
    add.update_arg(1, rounded)
    three[Phase.FORWARD].recompile()
