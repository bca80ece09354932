"""A guess at the whole graph of a model that fx cannot trace, used only to find the first and last layers.

Tests of values are false, unless the code then raises, as checks of shapes do. Modules that stay untraceable are one
call. Such a graph proves nothing, so it is used only where the alternative is a guess by names.
"""

import inspect
from collections.abc import Callable

from torch import fx, nn

from nmcompile.arguments import Args
from nmcompile.capture.clones import own_copy, shadow_tree
from nmcompile.capture.site_index import SiteIndex
from nmcompile.capture.sites import FoundSite, is_attention, is_layer
from nmcompile.capture.stitch import SCOPE, StitchTracer, layers_of
from nmcompile.capture.tracer import ModuleTracer
from nmcompile.ir.captured import WholeGraph

MAIN_INPUTS = ("input_ids", "decoder_input_ids", "pixel_values", "input_features", "input_values")
"""The inputs that Hugging Face models require, although all of their arguments are optional."""
MOST_INPUTS = 8
MOST_TRIES = 40  # per model: another try may trace all of it again
MOST_DECISIONS = 50  # per call of a module: a loop that waits for a value would never end
ENTRY = "model"


def outline(model: nn.Module, sites: list[FoundSite], protected: frozenset[int]) -> WholeGraph | None:
    """Trace a model along the likely branches; return None if even that fails."""
    names = _input_names(model)
    if not 0 < len(names) <= MOST_INPUTS:
        return None
    tracer = OutlineTracer(model, protected)
    try:
        graph = tracer.trace(_Entry(shadow_tree(model), names))
    except Exception:
        return None
    result = own_copy(graph)
    for node, original in zip(result.nodes, graph.nodes, strict=True):
        node.meta[SCOPE] = _inner(tracer.node_name_to_scope.get(original.name, ("", None))[0])
        if node.op in ("call_module", "get_attr"):
            node.target = _inner(str(node.target))
    return WholeGraph(result, layers_of(model, result, SiteIndex(sites)), "outline")


def _input_names(model: nn.Module) -> tuple[str, ...]:
    """Return the arguments that a plain call passes."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty]
    return tuple(required or [p.name for p in named if p.name in MAIN_INPUTS] or [p.name for p in named[:1]])


def _inner(path: str) -> str:
    return path.removeprefix(ENTRY).removeprefix(".")


class _Entry(nn.Module):
    """A call of the model by argument names, which fx can trace through decorators that change the signature."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(
        self,
        a: object,
        b: object = None,
        c: object = None,
        d: object = None,
        e: object = None,
        f: object = None,
        g: object = None,
        h: object = None,
    ) -> object:
        return self.model(**dict(zip(self.names, (a, b, c, d, e, f, g, h), strict=False)))


class OutlineTracer(StitchTracer):
    """A tracer that decides tests of values, and reverses decisions where a module then fails."""

    def __init__(self, model: nn.Module, protected: frozenset[int]) -> None:
        super().__init__(model, {}, protected)
        self.decisions: list[bool] = []
        self.position = 0
        self.tries = 0
        self.own = 0  # decisions of the module that is being traced

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or is_attention(m) or not m._modules

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.own += 1
        if self.own > MOST_DECISIONS:
            raise RuntimeError("it tests values again and again")
        if self.position == len(self.decisions):
            self.decisions.append(False)
        self.position += 1
        return self.decisions[self.position - 1]

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: Args, kwargs: dict[str, object]
    ) -> object:
        name, start = self.path_of_module(m), self.position
        if self.is_leaf_module(m, name):
            return ModuleTracer.call_module(self, m, forward, args, kwargs)
        length, stack, outer = len(self.graph.nodes), dict(self.module_stack), self.own
        while True:
            self.own = 0
            try:
                return ModuleTracer.call_module(self, m, forward, args, kwargs)
            except Exception:
                self._roll_back(length)
                self.module_stack.clear()
                self.module_stack.update(stack)
            finally:
                self.own = outer
            self.position = start
            if not self._decide_otherwise(start):
                break
        del self.decisions[start:]
        if name == ENTRY:
            raise RuntimeError("no way through the model's own forward was found")
        return self.create_proxy("call_module", name, args, kwargs)

    def _decide_otherwise(self, start: int) -> bool:
        """Reverse the last decision since `start` that is still False; return whether another try is worthwhile."""
        self.tries += 1
        while len(self.decisions) > start and self.decisions[-1]:
            self.decisions.pop()
        if len(self.decisions) > start:
            self.decisions[-1] = True
        return len(self.decisions) > start and self.tries <= MOST_TRIES
