"""Put the input of the forward GEMM on its grid, after its pruning.

gemm_forward(input, weight)      ->  gemm_forward(to_grid(input, input_step, bits), weight)
input_mask = prune_mask(input)   ->  input_mask = prune_mask(to_grid(input, input_step, bits))
gemm_update(grad_output, input)  ->  gemm_update(grad_output, input_quantized)
dX = gemm_backward(...)          ->  inside_grid(gemm_backward(...), input_beyond), and the gradient of input_step
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.node import Argument, Target

from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.graph_results import results_of, set_results
from nmcompile.ir.node_meta import NodeMeta
from nmcompile.ir.plan import PlanRow
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.passes.rewriting import gemm_node, placeholder, quantize_operand, rank_on_grid


@dataclass(frozen=True)
class QuantizeInputs:
    """A pass that quantizes X with a calibrated or learned step; gradients pass straight through inside the grid.

    Clipped values have no gradient; they move the clip instead (PACT), which the backward graph returns second.
    """

    name: ClassVar[str] = "quantize-inputs"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            if row := three.plan.grid_row("input"):
                _quantize_forward(three, row)
                _clip_gradient(three, row)
                _reread_input(three, Phase.BACKWARD)
                _reread_input(three, Phase.UPDATE)


def _quantize_forward(three: ThreeGraphs, row: PlanRow) -> None:
    graph, gemm = three[Phase.FORWARD].graph, gemm_node(three, Phase.FORWARD)
    before, quantized = quantize_operand(three, Phase.FORWARD, "input", row)
    rank_on_grid(three, before, "input", row)
    with graph.inserting_before(gemm):
        beyond = _view(three, Phase.FORWARD, "input_beyond", ops.beyond_grid, (before, *_grid_args(graph, row)))
    output, *saved = results_of(graph)
    # The pruned input that was saved for backward is replaced by the quantized one.
    kept = [(name, node) for name, node in zip(three.saved, saved, strict=True) if name != "input_pruned"]
    kept += [("input_quantized", quantized), ("input_beyond", beyond)]
    set_results(graph, [output, *(node for _, node in kept)])
    three.saved = tuple(name for name, _ in kept)
    three[Phase.FORWARD].recompile()


def _clip_gradient(three: ThreeGraphs, row: PlanRow) -> None:
    graph = three[Phase.BACKWARD].graph
    gradient = results_of(graph)[0]
    beyond = placeholder(graph, "input_beyond")
    step_args = (gradient, beyond, *_grid_args(graph, row))
    with graph.inserting_before(graph.output_node()):
        inside = _view(three, Phase.BACKWARD, "grad_input_inside", ops.inside_grid, (gradient, beyond))
        step = _view(three, Phase.BACKWARD, "grad_input_step", ops.step_gradient, step_args)
    set_results(graph, [inside, step])
    three[Phase.BACKWARD].recompile()


def _reread_input(three: ThreeGraphs, phase: Phase) -> None:
    graph = three[phase].graph
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.target in ("input", "input_pruned")]:
        node.replace_all_uses_with(placeholder(graph, "input_quantized"))
        graph.erase_node(node)
    three[phase].recompile()


def _grid_args(graph: fx.Graph, row: PlanRow) -> tuple[fx.Node, int, bool]:
    assert row.grid is not None
    return placeholder(graph, "input_step"), row.grid.bits, row.grid.signed


def _view(three: ThreeGraphs, phase: Phase, name: str, target: Target, args: tuple[Argument, ...]) -> fx.Node:
    return ops.add_node(three[phase].graph, NodeMeta("view", three.layer, phase), name, target, args)
