"""Streams: layers whose results are added or concatenated, as along the residual connections of a network.

If all results of a stream are whole multiples of one step, so are their sums, and a runtime adds integers without
rounding. This needs room: a sum of k results reaches k times as far as one of them, and has to fit into 8 bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from nmcompile.capture.ranges import plain_name
from nmcompile.capture.readers import BOUNDED, TRANSPARENT
from nmcompile.ir.captured import Stream, WholeGraph

SUMS = {"add", "iadd"}
JOINS = {"cat", "concat", "concatenate"}
BYTE, HALF = 255, 127


@dataclass(frozen=True)
class _Flow:
    """A value made of results of layers: these layers, and its bounds, if each result is between -1 and 1."""

    layers: frozenset[str]
    low: int
    high: int

    def room(self) -> int:
        """Return how many steps one result may reach so that the value fits into 8 bits."""
        return HALF // max(-self.low, self.high) if self.low else BYTE // max(self.high, 1)


def streams_of(model: nn.Module, whole: WholeGraph, results: Mapping[fx.Node, str]) -> dict[str, Stream]:
    """Return the stream of each layer whose result is added to others or concatenated.

    Args:
        results: by node, the layer whose result it is, after the norm that export absorbs.
    """
    flows: dict[fx.Node, _Flow] = {}
    groups: list[tuple[frozenset[str], int]] = []
    for node in whole.graph.nodes:
        flow = _Flow(frozenset({results[node]}), -1, 1) if node in results else _flow(model, node, flows)
        if flow is not None:
            flows[node] = flow
            if len(flow.layers) > 1 and not _is_rectified(model, node):
                groups.append((flow.layers, flow.room()))
    return {name: stream for stream in _merged(groups) for name in stream.layers}


def _flow(model: nn.Module, node: fx.Node, flows: Mapping[fx.Node, _Flow]) -> _Flow | None:
    """Return what a node makes of the flows that it reads; None if it makes anything else."""
    name, inputs = plain_name(model, node), node.all_input_nodes
    if not inputs or any(one not in flows for one in inputs):
        return None
    read = [flows[one] for one in inputs]
    if name in SUMS and not node.kwargs and len(node.args) == len(inputs) == 2:
        return _Flow(_layers(read), sum(one.low for one in read), sum(one.high for one in read))
    if name in JOINS:
        return _Flow(_layers(read), min(one.low for one in read), max(one.high for one in read))
    if name not in TRANSPARENT or name in BOUNDED or len(read) > 1:
        return None
    return _Flow(read[0].layers, 0, read[0].high) if name == "relu" else read[0]


def _layers(read: Iterable[_Flow]) -> frozenset[str]:
    return frozenset().union(*(one.layers for one in read))


def _is_rectified(model: nn.Module, node: fx.Node) -> bool:
    """Return whether only ReLUs read a value: a runtime computes both at once, and stores the ReLU's result alone."""
    return bool(node.users) and all(plain_name(model, user) == "relu" for user in node.users)


def _merged(groups: Sequence[tuple[frozenset[str], int]]) -> list[Stream]:
    """Unite groups that share a layer; the least room counts."""
    streams: list[tuple[frozenset[str], int]] = []
    for layers, room in groups:
        apart = [one for one in streams if not one[0] & layers]
        touched = [one for one in streams if one[0] & layers]
        streams = [*apart, (layers.union(*(one[0] for one in touched)), min([room, *(one[1] for one in touched)]))]
    return [Stream(tuple(sorted(layers)), room) for layers, room in streams]
