"""A plain model -> a graph of ATen's calls, with parameters and buffers by name."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from nmcompile.arguments import Args, Kwargs
from nmcompile.errors import ExportError
from nmcompile.own_thread import exporting_alone
from nmcompile.printable import first_line

aten = torch.ops.aten
NOTHING = frozenset({aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default})


@dataclass(frozen=True)
class Graph:
    """A model's graph.

    Args:
        graph: placeholders, calls, and one output.
        constants: what some placeholders hold.
        parameters: the name of each placeholder that is a parameter.
        inputs: the other placeholders, in the order of the leaves of (args, kwargs).
        outputs: the leaves of the result: nodes, or constants.
        takes, returns: the structures of (args, kwargs) and of the result.
    """

    graph: fx.Graph
    constants: Mapping[fx.Node, object]
    parameters: Mapping[fx.Node, str]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[object, ...]
    takes: pytree.TreeSpec
    returns: pytree.TreeSpec

    def attribute(self, node: fx.Node) -> object:
        """Return what a node takes from the graph's module: the graph of a branch, say."""
        return operator.attrgetter(str(node.target))(self.graph.owning_module)


def trace_graph(plain: nn.Module, args: Args, kwargs: Kwargs) -> Graph:
    """Trace what a model in eval mode computes for inputs of these shapes.

    Raises:
        ExportError: torch.export cannot trace the model, or it writes its own buffers.
    """
    try:
        with exporting_alone(), torch.no_grad():
            program = torch.export.export(plain, args, dict(kwargs)).run_decompositions({})
    except Exception as error:  # anything that the model's own code raises
        raise ExportError(f"torch.export cannot trace {type(plain).__name__}: {first_line(error)}") from error
    signature = program.graph_signature
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise ExportError(
            f"{type(plain).__name__} writes its buffers or inputs when it is called, and a runtime has no state; leave "
            "that out of forward"
        )
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = {**program.constants, **program.state_dict}
    tensors = {**names, **signature.inputs_to_lifted_tensor_constants}
    _drop_nothings(program.graph)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    held = {node: _at_rest(lifted[tensors[node.name]]) for node in placeholders if node.name in tensors}
    spec = program.call_spec
    return Graph(
        program.graph,
        held,
        {node: names[node.name] for node in placeholders if node.name in names},
        tuple(node for node in placeholders if node not in held),
        tuple(program.graph.output_node().args[0]),
        spec.in_spec,
        spec.out_spec,
    )


def _at_rest(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _drop_nothings(graph: fx.Graph) -> None:
    """Remove calls that return their input, so that a value has all of its readers."""
    for node in list(graph.nodes):
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _does_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target is aten.adaptive_avg_pool2d.default:  # the mean of one element
        return shape_of(node) == shape_of(node.args[0])
    return node.target in NOTHING


def shape_of(node: object) -> tuple[int, ...]:
    """Return the shape of a node's tensor; () if it has none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def norm_result(norm: fx.Node) -> fx.Node | None:
    """Return the node of a batch norm's result, if that alone is read."""
    if norm.target is aten.batch_norm.default:
        return norm
    users = [user for user in norm.users if user.users]
    if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0:
        return users[0]
    return None
