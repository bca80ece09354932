"""The whole model as one fx graph, with module graphs inlined into their callers; used for analysis only.

A module that cannot be traced is rolled back and stays one call; so do torch.nn's own modules, layers and attention.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

from torch import fx, nn

from nmcompile.arguments import Args, Kwargs
from nmcompile.capture.clones import own_copy, shadow_tree
from nmcompile.capture.names import operator_name, summary
from nmcompile.capture.products import rewrite_products
from nmcompile.capture.regions import is_traceable
from nmcompile.capture.site_index import SiteIndex
from nmcompile.capture.sites import FoundSite, norm_names
from nmcompile.capture.tracer import ModuleTracer
from nmcompile.capture.weights import matrix_dims, parameters_behind, read_attribute
from nmcompile.ir.calls import match_call
from nmcompile.ir.captured import WholeGraph

SCOPE = "module"
"""Key of `node.meta`: the name of the module whose code made the node."""


def stitch(model: nn.Module, sites: list[FoundSite], protected: frozenset[int]) -> tuple[WholeGraph | None, str]:
    """Return the stitched graph, or the reason why there is none."""
    try:
        graph = _graph_of(model, protected)
    except Exception as error:
        return None, f"{type(model).__name__}.forward cannot be traced ({summary(error)})"
    refused = rewrite_products(graph, lambda node: node.op == "placeholder", partial(matrix_dims, model))
    names = norm_names(model)
    norms = {node: str(node.target) for node in graph.nodes if node.op == "call_module" and node.target in names}
    products = frozenset(one.node for one in refused)
    layers = layers_of(model, graph, SiteIndex(sites))
    modules = {node: str(node.target) if node.op == "call_module" else node.meta[SCOPE] for node in graph.nodes}
    return WholeGraph(graph, layers, "fx", norms=norms, products=products, modules=modules), ""


def _graph_of(model: nn.Module, protected: frozenset[int]) -> fx.Graph:
    if isinstance(model, fx.GraphModule):
        return _scoped(own_copy(model.graph), {})
    bound, failures = _optional(model), []
    for bindings in (bound, {}) if bound else ({},):
        tracer = StitchTracer(model, bindings, protected)
        try:
            return _scoped(tracer.trace(shadow_tree(model)), tracer.node_name_to_scope)
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _optional(model: nn.Module) -> dict[str, object]:
    """Return the defaults of the root's optional arguments if it has required ones too: a plain call uses them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if not any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _scoped(graph: fx.Graph, scopes: Mapping[str, tuple[str, object]]) -> fx.Graph:
    result = own_copy(graph)
    for node, original in zip(result.nodes, graph.nodes, strict=True):
        node.meta[SCOPE] = scopes.get(original.name, ("", None))[0]
    return result


class StitchTracer(ModuleTracer):
    """A tracer that traces through the children whose code can be traced."""

    def __init__(self, model: nn.Module, bindings: Kwargs, protected: frozenset[int]) -> None:
        super().__init__(bindings, protected)
        self.originals = {id(module): name for name, module in model.named_modules()}
        self.cache: dict[str, fx.Proxy] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_plain_sequence = isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward
        return not (is_plain_sequence or is_traceable(m))

    def path_of_module(self, mod: nn.Module) -> str:
        return self.originals[id(mod)] if id(mod) in self.originals else super().path_of_module(mod)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, fx.Proxy]) -> object:
        self.cache = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: Args, kwargs: dict[str, object]
    ) -> object:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        length, stack = len(self.graph.nodes), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self._roll_back(length)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return self.create_proxy("call_module", name, args, kwargs)

    def _roll_back(self, length: int) -> None:
        """Remove the nodes that a failed call has made."""
        for node in list(self.graph.nodes)[length:][::-1]:
            for name in [name for name, proxy in self.cache.items() if proxy.node is node]:
                del self.cache[name]
            self.graph.erase_node(node)


def _weights_given(node: fx.Node) -> list[fx.Node]:
    """Return the attributes that a function takes beside activations; not an embedding's, which a layer may share."""
    inputs = node.all_input_nodes
    given = [i for i in inputs if i.op == "get_attr"]
    takes_both = node.op == "call_function" and 0 < len(given) < len(inputs)
    return given if takes_both and "embedding" not in operator_name(node) else []


def layers_of(model: nn.Module, graph: fx.Graph, index: SiteIndex) -> dict[fx.Node, tuple[str, ...]]:
    """Return the nodes that are, or hold, layers, with the layers' names."""
    layers: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        call = match_call(node)
        if call is not None:
            names = index.of_call(node.meta[SCOPE], parameters_behind(model, call))
        elif node.op == "call_module":
            names = index.within(str(node.target))
        else:
            names = index.given(id(read_attribute(model, str(i.target))) for i in _weights_given(node))
        if names:
            layers[node] = names
    return layers
