"""The whole model as seen by `torch.export`, mapped back to module names; used for analysis only."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from nmcompile.arguments import Args, copies_of, tensors_in
from nmcompile.capture.clones import own_copy
from nmcompile.capture.names import operator_name, summary
from nmcompile.capture.products import rewrite_products
from nmcompile.capture.regions import reads_value
from nmcompile.capture.site_index import SiteIndex
from nmcompile.capture.sites import FoundSite, norm_names
from nmcompile.capture.state import Memory, contents_unchanged
from nmcompile.errors import CaptureError
from nmcompile.ir.calls import match_call
from nmcompile.ir.captured import WholeGraph
from nmcompile.ir.expression import expression_of
from nmcompile.own_thread import exporting_alone, silent
from nmcompile.three_gemm.fast_paths import FAST_PATHS


@dataclass(frozen=True)
class Exported:
    """The whole graph and the number of positions at each layer, or the reason why there is no graph.

    Args:
        called: the modules that the example called; None if it did not run.
        reads: by layer name, the class of the module that reads its weight in the example without calling it.
    """

    whole: WholeGraph | None
    positions: Mapping[str, int] = field(default_factory=dict)
    failure: str = ""
    called: frozenset[str] | None = None
    reads: Mapping[str, str] = field(default_factory=dict)


def export_whole(model: nn.Module, found: list[FoundSite], args: Args, kwargs: dict[str, object]) -> Exported:
    """Export the model in its current mode.

    Raises:
        CaptureError: the model itself refuses the arguments.
    """
    try:
        # Export prints the graph that it could not finish; the report shows the reason, which is enough.
        with exporting_alone(), silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch does not reset the context variables that it sets; a copy of the context discards them.
            program = copy_context().run(torch.export.export, _TensorOutputs(model), args, kwargs, strict=False)
    except Exception as error:
        return Exported(
            None, failure=f"torch.export failed ({summary(error)})", called=_called_in_run(model, args, kwargs)
        )
    return _Reader(model, program, found).read()


class _TensorOutputs(nn.Module):
    """The model with only its tensors as outputs: export refuses caches and other classes that it does not know."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> list[Tensor]:
        return list(tensors_in(self.model(*args, **kwargs)))


PREFIX = "model."


def _called_in_run(model: nn.Module, args: Args, kwargs: dict[str, object]) -> frozenset[str]:
    """Run the model once unchanged and return the modules that it calls; undo its writes to buffers."""
    called: set[str] = set()
    hooks = [module.register_forward_pre_hook(_noting(called, name)) for name, module in model.named_modules()]
    args, kwargs = copies_of(args, kwargs)
    try:
        with contents_unchanged(Memory(model)), torch.no_grad():
            model(*args, **kwargs)
        return frozenset(called)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not accept args={describe(args)}, kwargs={describe(kwargs)}: "
            f"{summary(error)}; pass args= (and kwargs=) that the model runs on"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _noting(called: set[str], name: str) -> Callable[[nn.Module, object], None]:
    return lambda module, inputs: called.add(name)


def describe(value: object) -> str:
    """Return arguments as text, with tensors as their shapes."""
    return str(pytree.tree_map(lambda leaf: _Shown(leaf) if isinstance(leaf, Tensor) else leaf, value))


class _Shown:
    def __init__(self, tensor: Tensor) -> None:
        self.text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    def __repr__(self) -> str:
        return self.text


class _Reader:
    """A mapping of an exported program's nodes to layers."""

    def __init__(self, model: nn.Module, program: ExportedProgram, found: list[FoundSite]) -> None:
        self.model = model
        self.program = program
        self.found = found
        self.modules = {one.site.module for one in found if not one.site.role}
        self.index = SiteIndex(found)
        self.sites = {one.site.layer.name: one.site for one in found}
        self.ids = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        signature = program.graph_signature
        names = signature.inputs_to_parameters
        self.parameters = {node: name.removeprefix(PREFIX) for node, name in names.items()}
        held = signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
        self.constants = {node: name.removeprefix(PREFIX) for node, name in (names | held).items()}
        self.norms = norm_names(model)
        self.originals = {node.name: node for node in program.graph.nodes}

    def read(self) -> Exported:
        graph = own_copy(self.program.graph)
        refused = rewrite_products(graph, self._is_input, self._weight_dims)
        layers: dict[fx.Node, tuple[str, ...]] = {}
        norms: dict[fx.Node, str] = {}
        positions: dict[str, int] = {}
        for node in graph.nodes:
            original = self.originals[node.name]
            names = self._layers_of(node, _innermost(original))
            if names:
                layers[node] = names
            if len(names) == 1 and (count := self._positions(original, names[0])) is not None:
                positions[names[0]] = positions.get(names[0], 0) + count
            is_norm = node.op == "call_function" and operator_name(node) == "batch_norm"
            if is_norm and (module := _innermost(original)) in self.norms:
                norms[node] = module
        products = frozenset(one.node for one in refused)
        shapes = {node: _shapes(self.originals[node.name]) for node in graph.nodes}
        modules = {node: _innermost(self.originals[node.name]) for node in graph.nodes}
        whole = WholeGraph(graph, layers, "export", self.constants, norms, products, shapes, modules)
        return Exported(whole, positions, called=self._called(), reads=dict(self._reads()))

    def _called(self) -> frozenset[str]:
        stacks = (node.meta.get("nn_module_stack") or {} for node in self.program.graph.nodes)
        return frozenset(_path(entry) for stack in stacks for entry in stack.values())

    def _reads(self) -> Iterator[tuple[str, str]]:
        """Yield layers whose weight is read by an operator outside of them, with the class of the operator's module."""
        owners = {next(iter(one.parameters)): one.site for one in self.found if self._is_plain_module(one)}
        elsewhere = {
            (one.site.module, parameter) for one in self.found if one.site.role for parameter in one.parameters
        }
        for node in self.program.graph.nodes:
            parameter = self.ids.get(self.parameters.get(node.name, ""), 0)
            for user in node.users if parameter in owners else ():
                reader = _innermost(user)
                is_layer = reader in self.modules or (reader, parameter) in elsewhere
                if is_layer or user.op == "output" or not reads_value(node, user):
                    continue
                module = self.model.get_submodule(reader)
                if not isinstance(module, tuple(FAST_PATHS)):
                    yield owners[parameter].layer.name, type(module).__name__

    def _is_plain_module(self, one: FoundSite) -> bool:
        return not one.site.role and not one.site.is_expression and len(one.parameters) == 1

    def _layers_of(self, node: fx.Node, module: str) -> tuple[str, ...]:
        call = match_call(node)
        if call is None:
            return self._held_by(node)
        return self.index.of_call(module, self._parameters_behind(call.weight))

    def _held_by(self, node: fx.Node) -> tuple[str, ...]:
        """Return the layers whose weights a fused operator takes, such as attention's fast path."""
        if node.op != "call_function" or "embedding" in operator_name(node) or not self._depends_on_input(node):
            return ()
        return self.index.given(self.ids.get(self.parameters.get(i.name, ""), 0) for i in node.all_input_nodes)

    def _depends_on_input(self, node: fx.Node) -> bool:
        return any(self._is_input(one) for one in expression_of(node))

    def _is_input(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and node.name not in self.constants

    def _weight_dims(self, node: fx.Node) -> int | None:
        value = self.originals[node.name].meta.get("val")
        return value.dim() if isinstance(value, Tensor) and self._parameters_behind(node) else None

    def _parameters_behind(self, weight: object) -> frozenset[int]:
        if not isinstance(weight, fx.Node) or self._depends_on_input(weight):
            return frozenset()
        names = (self.parameters.get(node.name) for node in expression_of(weight) if node.op == "placeholder")
        return frozenset(self.ids[name] for name in names if name is not None)

    def _positions(self, node: fx.Node, name: str) -> int | None:
        value, layer = node.meta.get("val"), self.sites[name].layer
        if not isinstance(value, Tensor):
            return None
        sizes = [int(size) for size in value.shape if isinstance(size, int)]
        total = torch.Size(sizes).numel()
        return total // layer.out_features if layer.out_features else None


def _shapes(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a node's tensors; a size that depends on data is -1."""
    sizes = (tensor.shape for tensor in tensors_in(node.meta.get("val")))
    return tuple(tuple(size if isinstance(size, int) else -1 for size in shape) for shape in sizes)


def _innermost(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return _path(list(stack.values())[-1]) if stack else ""


def _path(entry: tuple[str, object]) -> str:
    """Return a module's name from its entry in a node's stack, without the number that marks a later call."""
    return f"{entry[0].partition('@')[0]}.".removeprefix(PREFIX).rstrip(".")
