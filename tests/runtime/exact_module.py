"""The module as an oracle: a compiled model of the reference backend whose GEMMs are sums of integers in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nmcompile.backends.reference.conv import conv_forward
from nmcompile.backends.reference.linear import linear_forward
from nmcompile.config import Phase
from nmcompile.ir import operations as ops
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.triple import GemmTriple


class Exact(Observer):
    """An observer that sums integers, and notes the integers of the input."""

    def __init__(self, triple: GemmTriple) -> None:
        super().__init__(triple)
        self.inputs: list[Tensor] = []

    def run(self, phase: Phase, values: Values) -> Results:
        return self.triple.run_graph(phase, values, _ExactNodes(self.triple.graphs[phase], self.inputs).run)


class _ExactNodes(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.inputs = inputs

    def run_node(self, n: fx.Node) -> object:
        is_gemm = n.target in (conv_forward, linear_forward)
        operands = [one for one in n.args[:2] if isinstance(one, fx.Node)] if is_gemm else []
        if not operands or any(one.target is not ops.to_grid for one in operands):
            return super().run_node(n)
        x, weight = (self.env[one] for one in operands)
        if n.target is conv_forward and weight.dim() != 4:
            return super().run_node(n)  # torch computes them in a runtime too
        x_step, weight_step = (self.env[one.all_input_nodes[1]] for one in operands)
        x, weight = torch.round(x / x_step).double(), torch.round(weight / weight_step).double()
        self.inputs.append(x)
        bias = self.env[n.args[2]] if isinstance(n.args[2], fx.Node) else None
        steps = (weight_step * x_step).reshape(-1)
        if n.target is linear_forward:
            y = F.linear(x, weight).float() * steps
            return y if bias is None else y + bias
        y = F.conv2d(x, weight, None, *n.args[3:7]).float() * steps[:, None, None]  # type: ignore[arg-type]
        return y if bias is None else y + bias[:, None, None]


@contextmanager
def exact(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Let the model sum integers inside this context; yield the integers of each layer's inputs, by its name."""
    noted: dict[str, list[Tensor]] = {}

    def make(triple: GemmTriple) -> Observer:
        observer = Exact(triple)
        noted[triple.layer.name] = observer.inputs
        return observer

    with observing(triples_of(model), make), torch.no_grad():
        yield noted
