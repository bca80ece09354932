"""Facts about each layer from data flow: whether it is first or last, its non-negative input, its positions."""

from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn
from torch.fx.node import Argument

from nmcompile.capture.names import is_torch_nn, operator_name, own_class
from nmcompile.capture.ranges import is_nonnegative, nonnegative_nodes
from nmcompile.capture.readers import norm_behind, readers_behind
from nmcompile.capture.streams import streams_of
from nmcompile.ir.calls import match_call
from nmcompile.ir.captured import Facts, Site, WholeGraph
from nmcompile.ir.element_reads import METADATA
from nmcompile.ir.layers import SpatialLayer

FEW_CHANNELS = 4
MERGES = {"add", "iadd", "sub", "isub", "mul", "imul"}
IN_ROLES = ("in_proj", "q_proj", "k_proj", "v_proj")


def facts_without_graph(
    model: nn.Module, sites: Sequence[Site], outline: WholeGraph | None, aside: frozenset[str] = frozenset()
) -> dict[str, Facts]:
    """Return facts by layer name without a whole graph: only the ends, from an outline or the order of modules.

    The layers in `aside` (adapters, recurrent ones) are never its ends.
    """
    if outline is not None:
        seen = facts_from_graph(model, sites, outline, {}, aside)
        return {name: Facts(first=facts.first, last=facts.last) for name, facts in seen.items()}
    first, last = guessed_ends([site for site in sites if site.layer.name not in aside])
    return {s.layer.name: Facts(first=s.layer.name == first, last=s.layer.name == last) for s in sites}


def guessed_ends(sites: Sequence[Site]) -> tuple[str | None, str | None]:
    """Return the first conv if it reads an image or a signal, and the last linear if it changes the width."""
    convs = [site.layer for site in sites if isinstance(site.layer, SpatialLayer)]
    linears = [site.layer for site in sites if site.layer.kind == "linear"]
    few = convs and convs[0].in_features * convs[0].groups <= FEW_CHANNELS
    changes = linears and linears[-1].out_features != linears[-1].in_features
    return convs[0].name if few else None, linears[-1].name if changes else None


def facts_from_graph(
    model: nn.Module,
    sites: Sequence[Site],
    whole: WholeGraph,
    positions: Mapping[str, int],
    adapters: frozenset[str] = frozenset(),
) -> dict[str, Facts]:
    """Return facts by layer name from the whole graph; adding an adapter's result leaves a layer the last one."""
    flow = _Flow(model, whole, adapters)
    by_name = {site.layer.name: site for site in sites}
    nodes: dict[str, list[fx.Node]] = {name: [] for name in by_name}
    for node, names in whole.layers.items():
        for name in names:
            nodes[name].append(node)
    proven = nonnegative_nodes(model, whole.graph)
    alone = {name: calls for name, calls in nodes.items() if len(calls) == 1 and len(whole.layers[calls[0]]) == 1}
    streams = streams_of(model, whole, {_result(whole, calls, calls[0]): name for name, calls in alone.items()})
    return {
        name: Facts(
            first=any(flow.is_first(site, node, by_name) for node in nodes[name]),
            last=any(flow.is_last(site, node, by_name) for node in nodes[name]),
            nonnegative=bool(nodes[name]) and all(_reads_nonnegative(site, node, proven) for node in nodes[name]),
            positions=positions.get(name),
            rectified=bool(nodes[name]) and all(flow.is_rectified(node) for node in nodes[name]),
            sources=frozenset().union(*(flow.sources[node] for node in nodes[name])),
            norm=norm_behind(whole, nodes[name]),
            readers=_readers(model, whole, nodes[name]),
            stream=streams.get(name),
        )
        for name, site in by_name.items()
    }


def _readers(model: nn.Module, whole: WholeGraph, nodes: Sequence[fx.Node]) -> frozenset[str]:
    """Return the readers of the results of all calls of a layer; none if the model returns one of these results."""
    found = [readers_behind(model, whole, _result(whole, nodes, node)) for node in nodes]
    return frozenset().union(*found) if all(found) else frozenset()


def _result(whole: WholeGraph, nodes: Sequence[fx.Node], node: fx.Node) -> fx.Node:
    """Return the result of a call of a layer: that of the norm after it, if export absorbs it."""
    return next(iter(node.users)) if norm_behind(whole, nodes) else node


def _reads_nonnegative(site: Site, node: fx.Node, proven: set[fx.Node]) -> bool:
    call = match_call(node)
    if call is not None:
        return is_nonnegative(call.input, proven)
    if site.role in IN_ROLES:
        return all(is_nonnegative(value, proven) for value in _queries(node))
    is_layer_call = node.op == "call_module" and node.target == site.module and site.role == ""
    given = [*node.args, *node.kwargs.values()]
    return is_layer_call and bool(given) and is_nonnegative(given[0], proven)


def _queries(node: fx.Node) -> list[Argument]:
    named = [node.kwargs[key] for key in ("query", "key", "value") if key in node.kwargs]
    return [*node.args[:3], *named]


class _Flow:
    """The layers before and after each node, as bit sets."""

    def __init__(self, model: nn.Module, whole: WholeGraph, adapters: frozenset[str]) -> None:
        self.model = model
        self.whole = whole
        self.adapters = adapters
        self.nodes = list(whole.graph.nodes)
        self.bits = {node: 1 << index for index, node in enumerate(n for n in self.nodes if self._is_barrier(n))}
        self.before: dict[fx.Node, int] = {}
        self.after: dict[fx.Node, int] = {}
        self.sources: dict[fx.Node, frozenset[str]] = {}
        self.fed: set[fx.Node] = set()
        self.reaches: set[fx.Node] = set()
        self._forward()
        self._backward()

    def _is_barrier(self, node: fx.Node) -> bool:
        """Return whether a node is a layer or acts as one: a functional call that is not a site, or an embedding."""
        if node in self.whole.layers or node in self.whole.products or match_call(node) is not None:
            return True
        if node.op == "call_module":
            return any(isinstance(m, nn.Embedding) for m in self.model.get_submodule(str(node.target)).modules())
        return node.op == "call_function" and operator_name(node) == "embedding"

    def _forward(self) -> None:
        for node in self.nodes:
            inputs = node.all_input_nodes
            self.sources[node] = frozenset().union(*(self._source(i) for i in inputs))
            if _asks_metadata(node):
                inputs = []  # A shape or a device carries no value that a layer computes.
            self.before[node] = _union(self.before[i] | self.bits.get(i, 0) for i in inputs)
            is_input = node.op == "placeholder" and node.name not in self.whole.constants
            if is_input or any(i in self.fed for i in inputs):
                self.fed.add(node)

    def _source(self, node: fx.Node) -> frozenset[str]:
        """Return a value's sources: the layer that computes it, the sources before it, or `""` for anything else."""
        names = self.whole.layers.get(node, ())
        is_input = node.op == "placeholder" and node.name not in self.whole.constants
        if node in self.bits or is_input:
            return frozenset(names if len(names) == 1 else ("",))
        return self.sources[node]

    def _backward(self) -> None:
        for node in reversed(self.nodes):
            self.after[node] = _union(self.after[u] | self.bits.get(u, 0) for u in node.users)
            if node.op == "output" or any(user in self.reaches for user in node.users):
                self.reaches.add(node)

    def is_rectified(self, node: fx.Node) -> bool:
        """Return whether every reader of the node is a ReLU."""
        return bool(node.users) and all(self._is_relu(user) for user in node.users)

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return own_class(module) is nn.ReLU and is_torch_nn(module)
        return node.op in ("call_function", "call_method") and operator_name(node).strip("_") == "relu"

    def is_first(self, site: Site, node: fx.Node, by_name: Mapping[str, Site]) -> bool:
        if self.before[node] or node not in self.fed:
            return False
        inside = [by_name[name] for name in self.whole.layers[node]]
        if len(inside) == 1 or (site.role in IN_ROLES and self._is_call_of(node, site.module)):
            return True
        return not self._has_embedding(node) and site.layer.name == guessed_ends(inside)[0]

    def is_last(self, site: Site, node: fx.Node, by_name: Mapping[str, Site]) -> bool:
        if site.layer.kind != "linear" or self.after[node] or node not in self.reaches:
            return False
        if self._is_merged(node):
            return False
        inside = [by_name[name] for name in self.whole.layers[node]]
        if len(inside) == 1 or self._is_call_of(node, site.module):
            return len(inside) == 1 or site.role == "out_proj"
        return not self._is_torch_nn_call(node) and site.layer.name == guessed_ends(inside)[1]

    def _is_merged(self, node: fx.Node) -> bool:
        """Return whether, on the way to the output, the node's result is added to another layer's."""
        mine = {node}
        for later in self.nodes:
            inputs = later.all_input_nodes
            if not any(i in mine for i in inputs):
                continue
            mine.add(later)
            if _is_merge(later) and any(self._is_others(i) for i in inputs if i not in mine):
                return True
        return False

    def _is_others(self, node: fx.Node) -> bool:
        """Return whether a value is computed by layers other than adapters."""
        return bool(self.before[node] | self.bits.get(node, 0)) and not self._source(node) <= self.adapters

    def _is_call_of(self, node: fx.Node, module: str) -> bool:
        return node.op == "call_module" and node.target == module

    def _is_torch_nn_call(self, node: fx.Node) -> bool:
        return node.op != "call_module" or type(self.model.get_submodule(str(node.target))).__module__.startswith(
            "torch.nn."
        )

    def _has_embedding(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return True
        return any(isinstance(m, nn.Embedding) for m in self.model.get_submodule(str(node.target)).modules())


def _asks_metadata(node: fx.Node) -> bool:
    is_attribute = node.op == "call_function" and node.target is getattr
    name = str(node.args[1]) if is_attribute else operator_name(node)
    return node.op in ("call_function", "call_method") and name in METADATA - {"type"} | {"sym_size"}


def _is_merge(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and operator_name(node) in MERGES


def _union(sets: Iterable[int]) -> int:
    total = 0
    for one in sets:
        total |= one
    return total
