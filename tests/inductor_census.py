"""The loops and the operators to which inductor lowers a training step.

Nothing is compiled from C++: each graph returns zeros of the sizes and strides that it would compute.
"""

from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FallbackKernel, IRNode, NoneAsConstantBuffer


class Operand(NamedTuple):
    """A tensor that an operator reads: the buffer that it lies in, and a meta tensor of its sizes and strides."""

    buffer: str
    layout: Tensor


@dataclass
class Census:
    """Census of both graphs of a step: inductor's loops, and the operands of each call of our operators."""

    loops: int = 0
    bytes_moved: int = 0
    calls: dict[str, list[list[Operand]]] = field(default_factory=dict)

    def count(self, graph: GraphLowering) -> None:
        for node in graph.scheduler.nodes:
            if not node.is_extern():
                self.loops += 1
                self.bytes_moved += node.get_read_write_buffers_sizes()
            elif isinstance(node.node, FallbackKernel):
                self._note(node.node)

    def _note(self, call: FallbackKernel) -> None:
        namespace, operator, _ = str(call.op_overload).split(".")
        if namespace == "nmcompile" and operator != "next_keys":
            operands = [Operand(x.get_name(), _empty(x)) for x in call.inputs if isinstance(x, IRNode)]
            self.calls.setdefault(operator, []).append(operands)


def census_of(model: nn.Module, x: Tensor) -> Census:
    """Lower a step of a model, the sum of whose outputs is the loss."""
    found = Census()

    def lower(graph: GraphLowering) -> "_Zeros":
        graph.codegen()
        found.count(graph)
        return _Zeros(graph)

    torch._dynamo.reset()
    uncached, unrecorded = config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False)
    with uncached, unrecorded, mock.patch.object(GraphLowering, "compile_to_module", lower):
        torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)(x).sum().backward()
    return found


class _Zeros:
    """A compiled graph that returns zeros."""

    def __init__(self, graph: GraphLowering) -> None:
        outputs = graph.graph_outputs
        self._outputs = [None if isinstance(x, NoneAsConstantBuffer) else _empty(x) for x in outputs]

    def call(self, arguments: list[object]) -> list[Tensor | None]:
        arguments.clear()
        return [None if x is None else torch.zeros_like(x, device="cpu") for x in self._outputs]


def _empty(x: IRNode) -> Tensor:
    """Return a meta tensor with the sizes, the strides and the dtype of a node."""
    sizes, strides = (list(map(int, values)) for values in (x.get_size(), x.get_stride()))
    return torch.empty_strided(sizes, strides, dtype=x.get_dtype(), device="meta")
