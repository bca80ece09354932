"""Shortcuts of frozen layers: one function of the input in place of a graph that asks and checks in each call.

In a graph of `torch.compile` such a layer is one operator, which finds the layer by its number and calls it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.autograd.profiler import record_function

from nmcompile.config import Phase
from nmcompile.custom_op import is_profiling, is_seen
from nmcompile.ir import operations as ops
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.node_meta import find_meta
from nmcompile.weight_cache import FROZEN

if TYPE_CHECKING:
    from nmcompile.three_gemm.triple import GemmTriple


class Shortcut:
    """One function in place of the forward graph, while nothing that it depends on was written.

    Args:
        triple: a layer that has just run.
        bias: the bias with which it ran.
        slot: the slot that holds the function.
    """

    def __init__(self, triple: "GemmTriple", bias: Tensor | None, slot: ChoiceSlot) -> None:
        assert triple.frozen is not None and triple.mask is not None
        self.frozen, self.bias, self.slot = triple.frozen, bias, slot
        self.code = _code(triple)
        self.mask = triple.mask.tensor
        self.read = [x for x in (self.mask, bias, *(step.clip for step in triple.steps.activations)) if x is not None]
        self.versions = [x._version for x in self.read]

    def run(self, triple: "GemmTriple", input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the layer's output; None if the graph has to run, since something has to see its operators, say."""
        if is_seen((input,), by_profiler=False) or torch._C._is_any_autocast_enabled():
            return None
        if is_profiling():
            with record_function("nmcompile::frozen_layer"):
                return self.run_unseen(triple, input, weight, bias)
        return self.run_unseen(triple, input, weight, bias)

    def run_unseen(self, triple: "GemmTriple", input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the layer's output, inside an operator that is seen already; None if the graph has to run."""
        ready = self.slot.ready
        if ready is None or not triple.layer.takes(input) or not self._holds(triple, weight, bias):
            return None
        return ready.run(input, self.slot)

    def _holds(self, triple: "GemmTriple", weight: Tensor, bias: Tensor | None) -> bool:
        """Return whether the promise holds, and graph, mask, bias and clips are those of before."""
        frozen = self.frozen
        if not (frozen.holds and frozen is triple.frozen and id(weight) in frozen.parameters and bias is self.bias):
            return False
        assert triple.mask is not None
        if triple.observer is not None or self.code is not _code(triple):
            return False
        if triple.mask.current(weight, FROZEN) is not self.mask:
            return False
        for x, version in zip(self.read, self.versions, strict=True):  # noqa: SIM110 - each call comes here
            if x._version != version:
                return False
        return True


def find_shortcut(triple: "GemmTriple", bias: Tensor | None) -> Shortcut | None:
    """Return the shortcut that a layer's last call has left, if there is one."""
    slot = slot_of(triple)
    if slot is None or slot.ready is None or triple.frozen is None or triple.mask is None:
        return None
    # Tensors made in inference mode have no version counter, so a write to them would not be seen.
    is_untracked = (bias is not None and bias.is_inference()) or triple.mask.tensor.is_inference()
    return None if is_untracked else Shortcut(triple, bias, slot)


def slot_of(triple: "GemmTriple") -> ChoiceSlot | None:
    """Return the slot that may hold a layer as a function of its input."""
    return _slot(triple.graphs.graphs[Phase.FORWARD])


def has_shortcut(graph: fx.GraphModule) -> bool:
    """Return whether a forward graph may get a shortcut: its GEMM reads the rounded input, and is the result.

    The input may be pruned before if the shortcut prunes it too.
    """
    return _slot(graph) is not None


def _slot(graph: fx.GraphModule) -> ChoiceSlot | None:
    results = next(node for node in reversed(graph.graph.nodes) if node.op == "output").args[0]
    gemm = results[0] if isinstance(results, tuple) else results
    meta = find_meta(gemm) if isinstance(gemm, fx.Node) else None
    if meta is None or meta.choice is None or meta.kind != "gemm":
        return None
    on_grid = gemm.args[0]
    is_rounded = isinstance(on_grid, fx.Node) and on_grid.target is ops.to_grid
    is_whole = is_rounded and [getattr(x, "target", None) for x in on_grid.args[:2]] == ["input", "input_step"]
    return meta.choice if is_whole or meta.choice.prunes else None


def _code(triple: "GemmTriple") -> object:
    return type(triple.graphs.graphs[Phase.FORWARD]).forward
