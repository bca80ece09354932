"""A layer run with unquantized activations: while its clips are being found, and before."""

from collections.abc import Mapping

from torch import Tensor, fx

from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import kind_of, row_of
from nmcompile.ir.plan import Operand
from nmcompile.three_gemm.absorbed_norm import AbsorbedNorm
from nmcompile.three_gemm.grid_steps import ActivationStep
from nmcompile.three_gemm.observer import Observer, Results, Values
from nmcompile.three_gemm.triple import GemmTriple

Steps = Mapping[Operand | None, ActivationStep]
"""Steps of activations, by operand."""


class Unquantized(Observer):
    """An observer that runs a layer and its norm with unquantized activations; a subclass may look at these."""

    def __init__(self, triple: GemmTriple) -> None:
        super().__init__(triple)
        self.steps = {step.row.operand: step for step in triple.steps.activations}

    def run(self, phase: Phase, values: Values) -> Results:
        return self.run_without(self.steps, phase, values)

    def run_without(self, operands: Steps, phase: Phase, values: Values) -> Results:
        """Run a graph with these operands unquantized; `show` sees them."""
        return self.triple.run_graph(phase, values, _UnquantizedNodes(self, operands, phase).run)

    def run_norm(self, norm: AbsorbedNorm, input: Tensor) -> Tensor:
        output, step = norm.run_absorbed(input, is_rounded=False), self.triple.steps.output
        if step is not None:
            self.show(step, output)
        return output

    def show(self, step: ActivationStep, x: Tensor) -> None:
        """Look at the values that the grid of a step would quantize."""


class _UnquantizedNodes(fx.Interpreter):
    """An interpreter that passes on the operands of quantizing nodes unchanged."""

    def __init__(self, observer: Unquantized, steps: Steps, phase: Phase) -> None:
        super().__init__(observer.triple.graphs[phase])
        self.observer = observer
        self.steps = steps

    def run_node(self, n: fx.Node) -> object:
        if n.target is ops.to_accumulator and "input" in self.steps:
            return self.env[n.all_input_nodes[0]]
        row = row_of(n)
        if row is None or not row.is_quantized or row.operand not in self.steps:
            return super().run_node(n)
        x = self.env[n.all_input_nodes[0]]
        if kind_of(n) == "quantize":
            self.observer.show(self.steps[row.operand], x)
        return x
