"""The walk through the whole graph that labels every value."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from nmcompile.ir.captured import WholeGraph
from nmcompile.ir.storage_key import storage_key
from nmcompile.permutation.call import Result, call_of
from nmcompile.permutation.constraints import Constraints
from nmcompile.permutation.labels import Label, Shape, Value, along
from nmcompile.permutation.operators import apply
from nmcompile.permutation.rules import Rules


@dataclass
class Axes:
    """The labels of each parameter and buffer, by name and by the dim along which its elements move."""

    labels: dict[tuple[str, int], Label] = field(default_factory=dict)

    def of(self, name: str) -> dict[int, Label]:
        """Return the labels of one tensor by dim."""
        return {dim: label for (owner, dim), label in self.labels.items() if owner == name}


def trace(whole: WholeGraph, tensors: Mapping[str, Tensor]) -> tuple[Constraints, Axes]:
    """Return what the graph asks of the channels of `tensors`, which may change; all others keep their places."""
    constraints, axes = Constraints(), Axes()
    names = _first_names(tensors)
    results: dict[fx.Node, Result] = {}
    for node in whole.graph.nodes:
        shapes = whole.shapes.get(node, ())
        rules = Rules(constraints, node.name)
        if node.op == "placeholder":
            results[node] = _held(node, whole, shapes, names, tensors, constraints, axes)
        elif node.op == "output":
            rules.fix(_values(node, results), "the model returns them")
        else:
            call = call_of(node, shapes, rules, lambda argument: _resolved(argument, results))
            results[node] = apply(call)
    return constraints, axes


def _held(
    node: fx.Node,
    whole: WholeGraph,
    shapes: tuple[Shape, ...],
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    constraints: Constraints,
    axes: Axes,
) -> Value:
    """Return the value of a placeholder: an input, or a tensor of the model."""
    shape = shapes[0] if shapes else ()
    if node.name not in whole.constants:
        return Value(shape, (), "an input of the model")
    name = names.get(whole.constants[node.name], "")
    if not name:
        held = "which state_dict does not hold as floats in memory of its own"
        return Value(shape, (), f"{whole.constants[node.name]}, {held}")
    return Value(shape, _labels_of(node, name, tensors[name], constraints, axes))


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name of a tensor that may change the first name of the same tensor.

    It is of floating point, and no other tensor shares its memory: a write to one would change both.
    """
    first: dict[int, str] = {}
    holders = Counter(map(storage_key, {id(one): one for one in tensors.values()}.values()))
    return {
        name: first.setdefault(id(one), name)
        for name, one in tensors.items()
        if one.is_floating_point() and holders[storage_key(one)] == 1
    }


def _labels_of(node: fx.Node, name: str, tensor: Tensor, constraints: Constraints, axes: Axes) -> tuple[Label, ...]:
    """Return a parameter's labels, the same ones under every name; each dim of more than one element has its own."""
    if not axes.of(name):
        groups = _groups_of(node)
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                axes.labels[name, dim] = _axis(constraints, tensor, dim, groups)
    return tuple(axes.of(name).values())


def _axis(constraints: Constraints, tensor: Tensor, dim: int, groups: int) -> Label:
    """Return new atoms along a dim; the in-channels of a grouped convolution are others in each group."""
    size, dims = tensor.shape[dim], tensor.dim()
    if dim != 1 or groups == 1:
        return along(constraints.fresh(size), dim, dims)
    rows = constraints.fresh(groups * size).reshape(groups, size).repeat_interleave(tensor.shape[0] // groups, 0)
    return rows.reshape(*rows.shape, *(1,) * (dims - 2))


def _groups_of(node: fx.Node) -> int:
    """Return the groups of the one convolution whose weight a placeholder is, else 1."""
    users = [user for user in node.users if user.args[1:2] == (node,) and "conv" in str(user.target)]
    if len(users) != len(node.users) or len(users) != 1 or "transpose" in str(users[0].target):
        return 1
    groups = users[0].kwargs.get("groups", users[0].args[-1] if len(users[0].args) in (7, 9) else 1)
    return groups if isinstance(groups, int) else 1


def _resolved(argument: object, results: Mapping[fx.Node, Result]) -> object:
    """Return an argument with values in place of nodes."""
    if isinstance(argument, fx.Node):
        return results[argument]
    return [_resolved(one, results) for one in argument] if isinstance(argument, tuple | list) else argument


def _values(node: fx.Node, results: Mapping[fx.Node, Result]) -> list[Value]:
    found = [results[one] for one in node.all_input_nodes]
    return [value for one in found for value in ([one] if isinstance(one, Value) else one)]
