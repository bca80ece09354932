"""A node of the graph as the analysis reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx
from torch.fx.node import Target

from nmcompile.permutation.labels import Shape, Value
from nmcompile.permutation.rules import Rules

Result = Value | Sequence[Value]
SIGNATURES = {"linear": "input weight bias", "linear_in_out": "input weight", "addmm": "self mat1 mat2"}


@dataclass(frozen=True)
class Call:
    """A node's operator, its arguments by name with values in place of nodes, and the shapes of its results."""

    name: str
    target: Target
    arguments: Mapping[str, object]
    shapes: tuple[Shape, ...]
    rules: Rules

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def values(self) -> list[Value]:
        """Return every value among the arguments."""
        found: list[Value] = []
        for one in self.arguments.values():
            found += [v for v in (one if isinstance(one, tuple | list) else [one]) if isinstance(v, Value)]
        return found

    def value(self, *names: str) -> Value:
        """Return the value under the first of these names that is an argument."""
        return cast(Value, next(self.arguments[name] for name in names if name in self.arguments))

    def optional(self, *names: str) -> list[Value]:
        """Return the values under these names, without those that are None."""
        return [one for one in map(self.arguments.get, names) if isinstance(one, Value)]

    def dims(self, name: str, of: Value) -> list[int]:
        """Return an argument that is a dim or several, or every dim if it is None."""
        given = self.arguments.get(name)
        if given is None or given == []:
            return list(range(len(of.shape)))
        return [dim % len(of.shape) for dim in (given if isinstance(given, list | tuple) else [cast(int, given)])]


def call_of(node: fx.Node, shapes: tuple[Shape, ...], rules: Rules, resolve: Callable[[object], object]) -> Call:
    """Return a node's call, with its arguments under the names of the operator's schema."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        names = [one.name for one in schema.arguments]
        name = schema.name.split("::")[-1]
    else:
        name = str(getattr(target, "__name__", target))
        names = SIGNATURES.get(name, "").split() or [str(number) for number in range(len(node.args))]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    arguments = {key: resolve(value) for key, value in given.items()}
    return Call(name.rstrip("_") if name.strip("_") else name, target, arguments, shapes, rules)


def viewed(value: Value, shape: Shape) -> Value:
    sizes = tuple(torch.empty(value.shape, device="meta").view(shape).shape)
    return value.moved(lambda label: label.reshape(sizes), sizes)


def as_channels(call: Call, trailing: int, *names: str) -> list[Value]:
    """Return vectors of one value a channel, with dims of size 1 behind."""
    return [viewed(one, (-1, *(1,) * trailing)) for one in call.optional(*names)]
