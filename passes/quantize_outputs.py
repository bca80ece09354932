"""Prune and quantize the output of a layer: after its ReLU if that is pruned or its grid unsigned, else directly.

Y = add_bias(...)                   ->  to_grid(apply_mask(relu(Y), output_mask), output_step, bits)
                                        with output_mask = prune_mask(to_grid(relu(Y), output_step, bits))
                                        to_grid(Y, output_step, bits)
gemm_update(grad_output, input)     ->  gemm_update(inside_grid(apply_mask(grad_output, output_mask), beyond), input)
gemm_backward(grad_output, weight)  ->  the same, and the gradient of output_step
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument, Target

from nmcompile.config import Phase
from nmcompile.errors import PreconditionError
from nmcompile.ir import operations as ops
from nmcompile.ir.graph_results import results_of, set_results
from nmcompile.ir.node_meta import Kind, NodeMeta, row_of
from nmcompile.ir.plan import PlanRow
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.passes.rewriting import gemm_node, placeholder, rank_on_grid


@dataclass(frozen=True)
class QuantizeOutputs:
    """A pass after which all readers of the layer's output read an activation that is pruned and on its grid.

    If a batch norm follows that export absorbs, the grid is the norm's (`nmcompile.three_gemm.absorbed_norm`). The
    model's own ReLU stays where it is and changes nothing any more, except that it passes no gradient where a small
    activation was rounded to zero.
    """

    name: ClassVar[str] = "quantize-outputs"

    def run(self, program: Program) -> None:
        for three in program.layers.values():
            prune, grid = three.plan.find(Phase.FORWARD, "output"), three.plan.grid_row("output")
            if three.plan.norm or (prune is None and grid is None):
                continue
            _rewrite_forward(three, prune, grid)
            _rewrite_gradient(three, Phase.BACKWARD, prune, grid)
            _rewrite_gradient(three, Phase.UPDATE, prune, grid)


def _rewrite_forward(three: ThreeGraphs, prune: PlanRow | None, grid: PlanRow | None) -> None:
    graph = three[Phase.FORWARD].graph
    results = results_of(graph)
    gemm_node(three, Phase.FORWARD)
    _refuse_twice(three, results[0])
    saved: dict[str, fx.Node] = {}
    output = results[0]
    with graph.inserting_before(graph.output_node()):
        if prune is not None or (grid is not None and grid.grid is not None and not grid.grid.signed):
            output = _add(three, Phase.FORWARD, "view", "output_rectified", torch.relu, (output,))
        if prune is not None and prune.pattern is not None:
            args = output, prune.operator, prune.pattern.n_keep, prune.pattern.block, three.layer.channel_dim
            mask = _add(three, Phase.FORWARD, "prune", "output_mask", ops.prune_mask, args, prune)
            output = _add(three, Phase.FORWARD, "view", "output_pruned", ops.apply_mask, (output, mask), prune)
            saved["output_mask"] = mask
        if grid is not None:
            on_grid = output, *_grid_args(graph, grid)
            saved["output_beyond"] = _add(three, Phase.FORWARD, "view", "output_beyond", ops.beyond_grid, on_grid)
            quantized = _add(three, Phase.FORWARD, "quantize", "output_quantized", ops.to_grid, on_grid, grid)
    if grid is not None:
        rank_on_grid(three, output, "output", grid)
        output = quantized
    set_results(graph, [output, *results[1:], *saved.values()])
    three.saved = (*three.saved, *saved)
    three[Phase.FORWARD].recompile()


def _rewrite_gradient(three: ThreeGraphs, phase: Phase, prune: PlanRow | None, grid: PlanRow | None) -> None:
    graph = three[phase].graph
    dense = gradient = placeholder(graph, "grad_output")
    readers = list(dense.users)
    names = [name for name, row in (("output_mask", prune), ("output_beyond", grid)) if row is not None]
    operands = {name: placeholder(graph, name) for name in names}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        if "output_mask" in operands:
            args = gradient, operands["output_mask"]
            gradient = _add(three, phase, "view", "grad_output_masked", ops.apply_mask, args)
        masked = gradient
        if "output_beyond" in operands:
            args = gradient, operands["output_beyond"]
            gradient = _add(three, phase, "view", "grad_output_inside", ops.inside_grid, args)
    for reader in readers:
        reader.replace_input_with(dense, gradient)
    if grid is not None and phase is Phase.BACKWARD:
        _return_step_gradient(three, (masked, operands["output_beyond"], *_grid_args(graph, grid)))
    three[phase].recompile()


def _return_step_gradient(three: ThreeGraphs, args: tuple[Argument, ...]) -> None:
    graph = three[Phase.BACKWARD].graph
    with graph.inserting_before(graph.output_node()):
        step = _add(three, Phase.BACKWARD, "view", "grad_output_step", ops.step_gradient, args)
    set_results(graph, [*results_of(graph), step])


def _refuse_twice(three: ThreeGraphs, result: fx.Node) -> None:
    row = row_of(result)
    if row is not None and row.operand == "output":
        raise PreconditionError(
            f"layer {three.layer.name!r}: the GEMM of its forward graph has a pruned or quantized output already; run "
            "each quantization pass once"
        )


def _grid_args(graph: fx.Graph, row: PlanRow) -> tuple[fx.Node, int, bool]:
    assert row.grid is not None
    return placeholder(graph, "output_step"), row.grid.bits, row.grid.signed


def _add(
    three: ThreeGraphs,
    phase: Phase,
    kind: Kind,
    name: str,
    target: Target,
    args: tuple[Argument, ...],
    row: PlanRow | None = None,
) -> fx.Node:
    return ops.add_node(three[phase].graph, NodeMeta(kind, three.layer, phase, row), name, target, args)
