"""Functional layers: conv and linear calls in the forwards of modules, and code that reads a layer's weight."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx, nn

from nmcompile.capture.clones import own_copy
from nmcompile.capture.faithful import Trace, trace_module, unfaithful
from nmcompile.capture.names import is_torch_nn, join, operator_name
from nmcompile.capture.products import Refused, rewrite_products
from nmcompile.capture.sites import FoundSite, is_attention, is_layer, layer_base, own_matrices
from nmcompile.capture.weights import Weight, adds_bias, find_weight, matrix_dims, weight_at
from nmcompile.ir.calls import Call, match_call
from nmcompile.ir.captured import Site
from nmcompile.ir.element_reads import LIKE_SECOND, is_metadata
from nmcompile.ir.expression import expression_of
from nmcompile.three_gemm.instance_forward import foreign_forward

GEMM_NAMES = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addmm",
    "convolution",
}  # fmt: skip
HANDED_ON = {"data", "detach", "alias"}


@dataclass
class Regions:
    """Findings from tracing every module by itself."""

    found: list[FoundSite] = field(default_factory=list)
    traces: dict[str, fx.Graph] = field(default_factory=dict)
    python: dict[str, str] = field(default_factory=dict)
    uncaptured: dict[str, frozenset[int]] = field(default_factory=dict)
    bypassed: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)


def find_regions(
    model: nn.Module, layers: list[FoundSite], protected: frozenset[int], differing: Mapping[str, str]
) -> Regions:
    """Trace every module that is not torch.nn's own.

    Args:
        model: the model.
        layers: the layers that are modules.
        protected: the storages that must not be written to.
        differing: by module name, why no forward may be generated for it.
    """
    finder = _Finder(model, layers, protected, differing)
    for name, module in model.named_modules():
        if is_traceable(module):
            finder.visit(name, module)
    finder.judge_readers()
    return finder.regions


def is_traceable(module: nn.Module) -> bool:
    """Return whether a module's forward is its own code, which could call layers."""
    if is_layer(module) or is_attention(module) or is_torch_nn(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).forward is not nn.Module.forward


class _Finder:
    def __init__(
        self, model: nn.Module, layers: list[FoundSite], protected: frozenset[int], differing: Mapping[str, str]
    ) -> None:
        self.regions = Regions()
        self.protected = protected
        self.differing = differing
        self.used = {found.site.layer.name for found in layers}
        self.owners = {found.site.weight: found.site for found in layers}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.readers: dict[str, str] = {}
        self.computing: set[str] = set()

    def visit(self, name: str, module: nn.Module) -> None:
        trace = trace_module(module, self.protected)
        graph = own_copy(trace.graph)
        refused = rewrite_products(graph, lambda node: node.op == "placeholder", partial(matrix_dims, module))
        matched = [call for call in map(match_call, graph.nodes) if call]
        calls = [(call, weight) for call in matched for weight in find_weight(module, call)]
        reason = unfaithful(module, trace, self.protected) if calls else _silence(module, trace, graph)
        reason = reason or self.differing.get(name, "")
        for one in refused:
            self._note_product(name, module, one)
        if not reason:
            self._add_sites(name, module, graph, calls)
        elif calls or might_call(module):
            kept = frozenset[int]().union(*(weight.parameters for _, weight in calls))
            owned = frozenset[int]() if calls and not trace.failure else own_matrices(module)
            self._note_python(name, reason + _listed(calls), kept | owned)
        roles = {found.site.role for found in self.regions.found if found.site.module == name}
        taken = [call for call in matched if call.node.name in roles]
        weights = [call.weight for call in taken if isinstance(call.weight, fx.Node)]
        inside = {call.node for call in taken}.union(*map(expression_of, weights))
        self._note_uses(module, graph, inside)

    def _note_product(self, name: str, module: nn.Module, refused: Refused) -> None:
        weight = weight_at(module, refused.operand, measure=False)
        assert weight is not None
        operand = f"{refused.label} on {' and '.join(weight.names)}"
        self._note_python(name, f"{operand} ({refused.node.name}): {refused.reason}", weight.parameters)

    def _add_sites(self, name: str, module: nn.Module, graph: fx.Graph, calls: list[tuple[Call, Weight]]) -> None:
        for call, weight in calls:
            refusal = weight.refusal or call.refusal() or _bias_refusal(module, call, weight)
            if refusal:
                self._note_python(name, f"{call.label} ({call.node.name}): {refusal}", weight.parameters)
                continue
            is_only = len(calls) == 1 and layer_base(module) is not None
            layer_name = self._unique(self._layer_name(name, call, weight, is_only))
            site = Site(
                call.layer(layer_name, weight.shape),
                name,
                call.node.name,
                join(name, _weight_name(call, weight, is_only)),
                weight.is_expression,
            )
            self.regions.found.append(FoundSite(site, weight.parameters))
            self.regions.traces[name] = graph

    def _layer_name(self, name: str, call: Call, weight: Weight, is_only: bool) -> str:
        if weight.attribute and not (is_only and weight.attribute == "weight"):
            return join(name, weight.attribute)
        return name if is_only else join(name, call.node.name)

    def _unique(self, name: str) -> str:
        candidates = (name if count == 0 else f"{name}.{count}" for count in range(len(self.used) + 1))
        unique = next(candidate for candidate in candidates if candidate not in self.used)
        self.used.add(unique)
        return unique

    def _note_python(self, name: str, reason: str, parameters: frozenset[int]) -> None:
        earlier = self.regions.python.get(name)
        self.regions.python[name] = f"{earlier}; {reason}" if earlier else reason
        self.regions.uncaptured[name] = self.regions.uncaptured.get(name, frozenset()) | parameters

    def _note_uses(self, module: nn.Module, graph: fx.Graph, inside: set[fx.Node]) -> None:
        """Note which layers the module calls, and whose weight it reads outside the nodes of its own layers."""
        for node in graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            target = str(node.target).replace(".parametrizations.", ".")
            owner, _, attribute = target.rpartition(".")
            if target == node.target and node.op == "call_module":
                self.regions.called.add(self._full_name(module, target))
            elif owner and (readers := [user for user in node.users if reads_value(node, user)]):
                weight = join(self._full_name(module, owner), attribute)
                if weight in self.owners:
                    self.readers.setdefault(weight, type(module).__name__)
                    if not inside.issuperset(readers):
                        self.computing.add(weight)

    def _full_name(self, module: nn.Module, path: str) -> str:
        return str(self.names.get(id(module.get_submodule(path)), path))

    def judge_readers(self) -> None:
        """Mark a layer whose weight is read as bypassed, unless it is called and all readers are masked too."""
        sites = {found.site.weight: found.site.layer.name for found in self.regions.found}
        for weight, reader in self.readers.items():
            owner = self.owners[weight]
            if owner.module in self.regions.called and weight not in self.computing:
                continue
            instead = f", where it is the layer {sites[weight]!r}" if weight in sites else ""
            self.regions.bypassed[owner.layer.name] = f"its weight is read by {reader}.forward{instead}"


def reads_value(weight: fx.Node, user: fx.Node) -> bool:
    """Return whether a node computes with the elements of a weight, and not only with its shape or type."""
    is_attribute = user.op == "call_function" and user.target is getattr
    name = str(user.args[1]) if is_attribute else operator_name(user)
    if name in HANDED_ON:
        return any(reads_value(user, later) for later in user.users)
    return not is_metadata(name) and not (name in LIKE_SECOND and user.args[:1] != (weight,))


def _weight_name(call: Call, weight: Weight, is_only: bool) -> str:
    """Return the weight's attribute, else the one parameter that the only call uses, else the call's name."""
    single = weight.names[0] if is_only and len(weight.names) == 1 else ""
    return weight.attribute or single or call.node.name


def _silence(module: nn.Module, trace: Trace, graph: fx.Graph) -> str:
    """Return why a trace without layers does not prove that there are none; "" if it does."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    seen = {id(parameter) for name, parameter in module.named_parameters() if name in read}
    complaint = next(iter(trace.complaints), "") if own_matrices(module) - seen else ""
    return foreign_forward(module) or trace.failure or complaint


def _bias_refusal(module: nn.Module, call: Call, weight: Weight) -> str:
    width = weight.shape[1 if call.transposed else 0]
    return "" if adds_bias(module, call, width) else "its addend is not a bias, one number for each output"


def _listed(calls: list[tuple[Call, Weight]]) -> str:
    if not calls:
        return ""
    listed = ", ".join(f"{call.label} on {' and '.join(weight.names or (call.node.name,))}" for call, weight in calls)
    return f"; so it keeps {listed}"


def might_call(module: nn.Module) -> bool:
    """Return whether code that cannot be traced might hold functional layers: it names one, or owns a matrix."""
    if own_matrices(module):
        return True
    written = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.") and cls is not object]
    functions = (function for cls in written for function in vars(cls).values())
    return any(GEMM_NAMES & set(names_in(f.__code__)) for f in functions if isinstance(f, types.FunctionType))


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
