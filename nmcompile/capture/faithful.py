"""Check of whether a module's graph may replace its forward, and the reason if not."""

import inspect
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from nmcompile.arguments import Kwargs
from nmcompile.capture.clones import shallow_clone
from nmcompile.capture.names import operator_name, summary
from nmcompile.capture.state import Memory, python_states
from nmcompile.capture.tracer import ModuleTracer
from nmcompile.three_gemm.instance_forward import foreign_forward

DRAWING = {
    "alpha_dropout", "bernoulli", "cauchy", "dropout", "dropout1d", "dropout2d", "dropout3d", "exponential",
    "feature_alpha_dropout", "feature_dropout", "fractional_max_pool2d", "fractional_max_pool3d", "geometric",
    "gumbel_softmax", "log_normal", "multinomial", "native_dropout", "normal", "poisson", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "random", "randperm", "rrelu", "uniform",
}  # fmt: skip
"""Operators that draw random numbers, by name without a trailing underscore."""
DRAWING_IF_POSITIVE = {"scaled_dot_product_attention", "multi_head_attention_forward"}


@dataclass(frozen=True)
class Trace:
    """The graph of a module's forward and the complaints of its tracer; an incomplete graph if tracing failed.

    `tested_for_none`: the arguments that the code tests for None.
    """

    graph: fx.Graph
    complaints: tuple[str, ...] = ()
    failure: str = ""
    tested_for_none: frozenset[str] = frozenset()


def trace_module(
    module: nn.Module, protected: frozenset[int], bindings: Kwargs | None = None, training: bool = False
) -> Trace:
    """Trace a module's forward; never raise.

    The traced module is a copy with its own attribute tables; it shares the module's children and tensors.

    Args:
        module: the module to trace; a GraphModule is its own trace.
        protected: the storages that must not be written to.
        bindings: values that replace arguments, by name.
        training: the copy's mode, and whether gradients are on.
    """
    if isinstance(module, fx.GraphModule):
        return Trace(module.graph)
    clone, tracer = shallow_clone(module), ModuleTracer(bindings, protected)
    clone.training = training
    before, drawn = Memory(clone), pickle.dumps(python_states())
    try:
        with torch.set_grad_enabled(training):
            graph = tracer.trace(clone)
        if pickle.dumps(python_states()) != drawn:
            return Trace(graph, failure="it draws random numbers of Python or NumPy")
        complaints = [*tracer.complaints, *(["it changes its attributes"] if before.changed() else [])]
        return Trace(graph, tuple(complaints), tested_for_none=frozenset(tracer.tested_for_none))
    except Exception as error:
        return Trace(getattr(tracer, "graph", fx.Graph()), failure=summary(error))
    finally:
        before.restore()


def unfaithful(module: nn.Module, trace: Trace, protected: frozenset[int]) -> str:
    """Return why a trace made in eval mode may not replace a module's forward; "" if it may."""
    if foreign := foreign_forward(module):
        return foreign
    if isinstance(module, fx.GraphModule):
        return ""
    return (
        trace.failure
        or next(iter(trace.complaints), "")
        or _drawing(trace.graph)
        or _differing_mode(module, trace.graph, protected)
        or _differing_argument(module, trace, protected)
    )


def _drawing(graph: fx.Graph) -> str:
    return next((f"it draws random numbers ({node.name})" for node in graph.nodes if draws(node)), "")


def draws(node: fx.Node) -> bool:
    """Return whether a node draws random numbers; a call of an `nn.Dropout` does not count, as the child decides."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = operator_name(node)
    if name in DRAWING_IF_POSITIVE:
        names = ("dropout_p",)
        return any(node.kwargs.get(key, 0) for key in names) or (len(node.args) > 4 and bool(node.args[4]))
    return name in DRAWING


def _differing_mode(module: nn.Module, graph: fx.Graph, protected: frozenset[int]) -> str:
    trained = trace_module(module, protected, training=True)
    if trained.failure:
        return f"it cannot be traced in train(): {trained.failure}"
    differs = "" if _same(graph, trained.graph, {}) else "its traces in train() and eval() differ"
    return next(iter(trained.complaints), "") or _drawing(trained.graph) or differs


def _differing_argument(module: nn.Module, trace: Trace, protected: frozenset[int]) -> str:
    """Return how the code takes another branch for None or a flag than for the proxy; "" if it does not."""
    for probe in _probes(module):
        probed = trace_module(module, protected, {probe.name: probe.value})
        if probed.failure and not probe.is_default and probe.name not in trace.tested_for_none:
            continue
        if probed.failure or not _same(trace.graph, probed.graph, {probe.name: probe.value}):
            return probe.claim
    return ""


@dataclass(frozen=True)
class _Probe:
    """A value for one argument, whether it is the argument's default, and the conclusion if the trace differs."""

    name: str
    value: object
    is_default: bool
    claim: str


def _probes(module: nn.Module) -> Iterator[_Probe]:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for parameter in named:
        test, default = f"its code tests the argument {parameter.name!r}", parameter.default
        yield _Probe(parameter.name, None, default is None, f"{test} for None")
        if isinstance(default, bool):
            yield _Probe(parameter.name, default, True, test)


def _same(graph: fx.Graph, other: fx.Graph, bindings: Kwargs) -> bool:
    """Return whether two traces are equal once the bound arguments of the first have their values."""
    return _shape_of(graph, bindings) == _shape_of(other, {})


@dataclass(frozen=True)
class _Reference:
    index: int | str


def _shape_of(graph: fx.Graph, bindings: Kwargs) -> list[object]:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    others = [node for node in graph.nodes if node.op != "placeholder"]
    known: dict[fx.Node, object] = {node: _Reference(index) for index, node in enumerate(others)}
    for node in inputs:
        known[node] = _Reference(str(node.target))
        if str(node.target) in bindings:
            known[node] = bindings[str(node.target)]

    def resolved(value: object) -> object:
        if isinstance(value, fx.Node):
            return known[value]
        if isinstance(value, slice):
            return ("slice", resolved(value.start), resolved(value.stop), resolved(value.step))
        if isinstance(value, dict):
            return {key: resolved(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [resolved(item) for item in value]
        return (type(value), repr(value))

    def settled(value: object) -> object:
        return value if isinstance(value, _Reference) else resolved(value)

    for node in inputs:
        known[node] = settled(known[node])
    return [(node.op, node.target, resolved(node.args), resolved(node.kwargs)) for node in others]
