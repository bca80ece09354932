"""A program under construction: the steps so far, and what each node of the graph has become."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from nmcompile.export.deployed_layer import DeployedActivation
from nmcompile.runtime.codes import Codes, full, image_of, is_identity, step_of, values_on
from nmcompile.runtime.layers import RuntimeLayer
from nmcompile.runtime.steps import Add, Call, Decode, Encode, Image, Layer, Recode, Step, Value
from nmcompile.runtime.trace import shape_of

aten = torch.ops.aten
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})


class Builder:
    """A list of steps, and by node codes, a value of torch, or a constant.

    Attributes:
        layers: by their conv or linear node.
        steps: in order.
        results: by node; those of nodes that a layer takes along are there before their turn.
    """

    def __init__(self, layers: Mapping[fx.Node, RuntimeLayer]) -> None:
        self.layers = layers
        self.steps: list[Step] = []
        self.results: dict[fx.Node, object] = {}
        self._floats: dict[fx.Node, object] = {}
        self._read: dict[tuple[fx.Node, DeployedActivation, int], Image] = {}
        self._shared: set[Image] = set()

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def codes_of(self, node: object) -> Codes | None:
        """Return the codes that a node has become; None if it is anything else."""
        found = self.results.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Codes) else None

    def is_computed(self, node: fx.Node) -> bool:
        """Return whether a node is float32 and depends on the inputs of the network."""
        value = node.meta.get("val")
        is_float32 = isinstance(value, Tensor) and value.dtype == torch.float32
        return is_float32 and isinstance(self.results[node], Codes | Value)

    def floats(self, node: fx.Node) -> object:
        """Return a node as torch has it: a value, or a constant."""
        codes = self.codes_of(node)
        if codes is None:
            return self.results[node]
        if node not in self._floats:
            result = self._floats[node] = Value(codes.shape)
            self.add(Decode(codes.image, result, full(codes.values)))
        return self._floats[node]

    def call(self, node: fx.Node) -> object:
        """Let torch compute a node; of constants, now."""
        args, kwargs = (map_aggregate(part, self._as_floats) for part in (node.args, node.kwargs))
        assert callable(node.target) and isinstance(args, tuple) and isinstance(kwargs, dict)
        inputs = [self.floats(one) for one in node.all_input_nodes]
        if inputs and not any(isinstance(one, Value) for one in inputs) and not _is_random(node):
            return node.target(*args, **kwargs)
        result = Value(shape_of(node))
        # The trace may see other strides than the values have, and a view needs the right ones.
        target = aten.reshape.default if node.target in VIEWS else node.target
        self.add(Call(name_of(node), target, args, dict(kwargs), result))
        return result

    def _as_floats(self, one: Any) -> Any:
        return self.floats(one) if isinstance(one, fx.Node) else one

    def read(self, node: fx.Node, wanted: DeployedActivation, channel_dim: int) -> Image:
        """Return the codes of a node on a grid, pruned if that is wanted."""
        key = node, wanted, channel_dim
        if key not in self._read:
            codes = self.codes_of(node)
            if codes is None or codes.channel_dim != channel_dim:
                codes = self.encoded(self.floats(node), wanted, shape_of(node), channel_dim)
            self._read[key] = self.recoded(codes, codes.table(wanted), wanted.pattern is not None)
        return self._read[key]

    def encoded(self, value: object, wanted: DeployedActivation, shape: tuple[int, ...], channel_dim: int) -> Codes:
        """Put a value on a grid."""
        image = image_of(shape, channel_dim)
        assert image is not None
        self.encode(value, wanted, image)
        return Codes(image, values_on(wanted), shape, channel_dim, step_of(wanted))

    def encode(self, value: object, wanted: DeployedActivation, image: Image) -> None:
        """Write the codes of a value on a grid."""
        grid = wanted.grid
        assert isinstance(value, Value) and grid is not None
        self.add(Encode(value, image, float(step_of(wanted)), grid.low, grid.high))

    def recoded(self, codes: Codes, table: Tensor, prune: bool = False) -> Image:
        """Return the image after a table, uint8, and pruning; the same one if neither changes it."""
        if is_identity(table) and not prune:
            return codes.image
        image = codes.image
        output = Image(image.samples, image.height, image.width, image.channels)
        self.add(Recode(image, output, None if is_identity(table) else full(table), prune))
        return output

    def bounded(self, codes: Codes, source: fx.Node) -> Codes:
        """Leave out codes at both ends that stand for one value, if nothing but `codes` reads the source's image."""
        if len(source.users) > 1:
            self._shared.add(codes.image)
        short, below = codes.trimmed()
        if codes.image in self._shared or len(short.values) == len(codes.values):
            return codes
        for index, step in enumerate(self.steps):
            if step.written is codes.image:
                bounded = _within(step, below, len(short.values))
                if bounded is not None:
                    self.steps[index] = bounded
                    return short
        return codes


def _within(step: Step, below: int, count: int) -> Step | None:
    """Return a step that writes `count` of its codes, from the one at `below` on; None if it cannot."""
    if isinstance(step, Encode) or (isinstance(step, Layer) and step.table is None and not step.prune):
        low = step.low + below
        return replace(step, low=low, high=low + count - 1)
    if isinstance(step, Add):
        return replace(step, offset=step.offset - below, low=0, high=count - 1)
    return None


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def name_of(node: fx.Node) -> str:
    """Return the name of an operator: `aten::relu` is `relu`."""
    name = str(getattr(node.target, "__name__", node.target))
    return name.removesuffix(".default")
