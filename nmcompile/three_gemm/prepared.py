"""Prepared graphs: calls that find every choice made already.

A lowered node asks in each call who has to see its operator, and which kernel pays. Both depend on how its operands
look and not on their values. So once a graph ran with dense kernels beyond doubt, operands that look the same run
through the same code, in which each node is the plain function behind it.
"""

from collections.abc import Callable, Hashable, Sequence
from types import FunctionType

import torch
from torch import Tensor, fx

from nmcompile.custom_op import direct, is_seen
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import settlement
from nmcompile.ir.node_meta import find_meta
from nmcompile.three_gemm.observer import Results
from nmcompile.weight_cache import content_at_rest

LOOKS = 64  # of a graph; more are made only by sizes that change all the time

# Without the Python around it, as each call asks.
is_deterministic = torch._C._get_deterministic_algorithms


class Prepared:
    """The direct code of one graph, and its settled choices by the look of the operands."""

    def __init__(self, graph: fx.GraphModule) -> None:
        metas = (find_meta(node) for node in graph.graph.nodes)
        self._slots = [meta.choice for meta in metas if meta is not None and meta.choice is not None]
        self._choices: dict[Hashable, list[Choice | None]] = {}
        self.code = type(graph).forward
        self._run = _direct_code(graph)

    def knows(self, look: Hashable) -> bool:
        """Return whether operands of this look need no choice."""
        return look in self._choices

    def learn(self, look: Hashable) -> None:
        """Record that the graph has just run with operands of this look."""
        if all(slot.is_settled for slot in self._slots):
            if len(self._choices) >= LOOKS:
                self._choices.clear()
            self._choices[look] = [slot.latest for slot in self._slots]

    def run(self, look: Hashable, operands: Sequence[Tensor | None]) -> Results:
        """Run the direct code on operands of a look that it knows."""
        for slot, choice in zip(self._slots, self._choices[look], strict=True):
            slot.latest = choice
        return self._run(*operands)


def look_of(operands: Sequence[Tensor | None]) -> Hashable | None:
    """Return everything that decides how a graph runs on these operands; None if something has to see it run."""
    if is_seen(operands) or torch._C._is_any_autocast_enabled():
        return None
    layouts = tuple([None if x is None else (x.dtype, x.device, x.shape, x.stride()) for x in operands])
    at_rest = content_at_rest() is not None
    return layouts, at_rest, torch.get_num_threads(), is_deterministic(), settlement()


def _direct_code(graph: fx.GraphModule) -> Callable[..., Results]:
    """Return the code of a graph in which no node looks for a compiler or chooses a kernel."""
    forward = type(graph).forward
    assert isinstance(forward, FunctionType)
    plain = {name: direct(value) if callable(value) else value for name, value in forward.__globals__.items()}
    run: Callable[..., Results] = FunctionType(forward.__code__, plain).__get__(graph)
    return run
