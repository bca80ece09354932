"""The operands of the GEMMs of a compiled model, as they reach the GEMM in a real step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from nmcompile.config import Phase
from nmcompile.ir.layers import Layer
from nmcompile.ir.node_meta import kind_of
from nmcompile.ir.plan import Operand
from nmcompile.three_gemm.find_triples import triples_of
from nmcompile.three_gemm.observer import Observer, Results, Values, observing
from nmcompile.three_gemm.triple import GemmTriple

OPERANDS: dict[Phase, tuple[Operand, Operand]] = {
    Phase.FORWARD: ("input", "weight"),
    Phase.BACKWARD: ("grad_output", "weight"),
    Phase.UPDATE: ("grad_output", "input"),
}
"""The factors of each GEMM, in the order of its arguments."""


@dataclass(frozen=True)
class GemmCall:
    """One GEMM that ran: its layer, its phase and its two operands by name."""

    layer: Layer
    phase: Phase
    operands: dict[Operand, Tensor]


def gemm_operands(model: nn.Module, step: Callable[[], object]) -> list[GemmCall]:
    """Return the operands of every GEMM that `step` runs.

    Args:
        model: compiled with `backend="reference"`, whose GEMMs prune nothing themselves.
        step: runs a forward, and a backward if those GEMMs are wanted too.
    """
    calls: list[GemmCall] = []
    with observing(triples_of(model), lambda triple: _Recorder(triple, calls)):
        step()
    return calls


class _Recorder(Observer):
    """An observer that keeps the operands of the GEMMs of one layer."""

    def __init__(self, triple: GemmTriple, calls: list[GemmCall]) -> None:
        super().__init__(triple)
        self.calls = calls

    def run(self, phase: Phase, values: Values) -> Results:
        return self.triple.run_graph(phase, values, _RecordedNodes(self, phase).run)


class _RecordedNodes(fx.Interpreter):
    """An interpreter that runs one graph, and keeps what its GEMM reads."""

    def __init__(self, recorder: _Recorder, phase: Phase) -> None:
        super().__init__(recorder.triple.graphs[phase])
        self.recorder, self.phase = recorder, phase

    def run_node(self, n: fx.Node) -> object:
        if kind_of(n) == "gemm":
            layer = self.recorder.triple.layer
            self.recorder.calls.append(GemmCall(layer, self.phase, dict(self._operands(n))))
        return super().run_node(n)

    def _operands(self, n: fx.Node) -> Iterator[tuple[Operand, Tensor]]:
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        for name, argument in zip(OPERANDS[self.phase], arguments, strict=False):
            assert isinstance(argument, Tensor)
            yield name, argument.detach()
