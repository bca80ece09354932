"""A conv or linear node, with the norm that its layer absorbs -> a step on codes, or what the module does in floats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from nmcompile.errors import ExportError
from nmcompile.export.deployed_layer import DeployedActivation
from nmcompile.ir.layers import ConvLayer
from nmcompile.ir.operations import to_grid
from nmcompile.pruning.references import OPERATORS
from nmcompile.runtime.builder import Builder
from nmcompile.runtime.codes import Codes, image_of, prunes_codes, step_of, values_on
from nmcompile.runtime.layers import RuntimeLayer
from nmcompile.runtime.readers import grid_of_readers
from nmcompile.runtime.steps import Call, Layer, LayerToFloats, Value, Weights, Window
from nmcompile.runtime.trace import norm_result, shape_of

aten = torch.ops.aten
CONVS = frozenset({aten.conv2d.default, aten.conv2d.padding})


@dataclass(frozen=True)
class LayerLowering:
    """The lowering of layers.

    Args:
        builder: where steps go.
        parameters: the names of parameters and buffers, by node.
    """

    builder: Builder
    parameters: Mapping[fx.Node, str]

    def lower(self, node: fx.Node) -> None:
        """Add a layer's steps, and note the results of its node and of its norm."""
        layer = self.builder.layers[node]
        end = self._end(node, layer)
        result = self._integers(node, end, layer) if self._fits(node, layer) else self._floats(node, end, layer)
        nodes = (node,) if end is node else (node, end.all_input_nodes[0], end)
        self.builder.results.update(dict.fromkeys(nodes, result))

    def _end(self, node: fx.Node, layer: RuntimeLayer) -> fx.Node:
        """Return the node of the layer's result: that of its norm, if it absorbs one."""
        if layer.gain is None:
            return node
        for norm in node.users:
            names = [self.parameters.get(arg) for arg in norm.args if isinstance(arg, fx.Node)]
            end = norm_result(norm) if f"{layer.deployed.norm}.running_mean" in names else None
            if end is not None and layer.layer.channel_dim % len(shape_of(node)) == 1:
                return end
        raise ExportError(
            f"layer {layer.name!r}: its norm {layer.deployed.norm!r} does not follow it along its channels in the "
            f"traced graph; leave the layer out with CompileConfig(layers={{{layer.name!r}: None}})"
        )

    def _fits(self, node: fx.Node, layer: RuntimeLayer) -> bool:
        """Return whether integer kernels compute the node."""
        source, geometry = node.args[0], layer.layer
        assert isinstance(source, fx.Node)
        if not (layer.has_integers and self.builder.is_computed(source)):
            return False
        if not isinstance(geometry, ConvLayer):
            return node.target is aten.linear.default and len(shape_of(source)) > 1
        is_symmetric = node.target is aten.conv2d.default or not geometry.pad_before
        return node.target in CONVS and is_symmetric and len(shape_of(source)) == 4

    def _integers(self, node: fx.Node, end: fx.Node, layer: RuntimeLayer) -> object:
        deployed, shape = layer.deployed, shape_of(end)
        source, grid = node.args[0], deployed.input.grid
        assert isinstance(source, fx.Node) and grid is not None
        channel_dim = layer.layer.channel_dim % len(shape)
        input = self.builder.read(source, deployed.input, channel_dim)
        bias = node.args[2] if len(node.args) > 2 else None
        weights = Weights(layer.name, layer.integers(), layer.steps(), self._bias(bias), layer.gain, layer.shift)
        sums = weights, _window(layer), layer.layer.groups, input, -grid.low, grid.high - grid.low
        rounded = self._rounded(end, layer)
        if rounded is None:
            result = Value(shape)
            self.builder.add(LayerToFloats(*sums, result))
            return self._as_deployed(end, layer, result)
        output, step, out_grid = image_of(shape, channel_dim), step_of(rounded), rounded.grid
        assert output is not None and out_grid is not None
        prune = rounded.pattern is not None
        self.builder.add(Layer(*sums, output, float(step), out_grid.low, out_grid.high, None, prune))
        return Codes(output, values_on(rounded), shape, channel_dim, step)

    def _bias(self, node: object) -> Tensor | None:
        bias = self.builder.results[node] if isinstance(node, fx.Node) else None
        return bias.contiguous() if isinstance(bias, Tensor) else None

    def _rounded(self, end: fx.Node, layer: RuntimeLayer) -> DeployedActivation | None:
        """Return the grid to which the result may be rounded; None if floats have to stay, or pruning is not 4:8."""
        output = layer.deployed.output
        if output == DeployedActivation():
            return grid_of_readers(end, self.builder.layers)
        is_known = output.pattern is None or prunes_codes(output, layer.layer.out_features)
        return output if output.grid is not None and is_known else None

    def _floats(self, node: fx.Node, end: fx.Node, layer: RuntimeLayer) -> object:
        """Compute what the module computes, by torch's own operator on activations on their grids."""
        builder, deployed = self.builder, layer.deployed
        source, *others = node.args
        assert isinstance(source, fx.Node)
        x = self._deployed(builder.floats(source), shape_of(source), layer, deployed.input)
        args = [x, *(builder.floats(one) if isinstance(one, fx.Node) else one for one in others)]
        result = self._called(node.target, args, shape_of(node), layer.name)
        if layer.gain is not None and layer.shift is not None:
            args = [result, layer.gain, layer.shift]
            result = self._called(scale_and_shift, args, shape_of(node), deployed.norm)
        return self._as_deployed(end, layer, result)

    def _as_deployed(self, end: fx.Node, layer: RuntimeLayer, result: Value) -> object:
        """Prune the result of a layer and put it on its grid, as the plan has it."""
        output, shape = layer.deployed.output, shape_of(end)
        channel_dim = layer.layer.channel_dim % len(shape)
        if output.grid is None or output.pattern is not None or image_of(shape, channel_dim) is None:
            return self._deployed(result, shape, layer, output, is_output=True)
        return self.builder.encoded(result, output, shape, channel_dim)

    def _deployed(
        self,
        x: object,
        shape: tuple[int, ...],
        layer: RuntimeLayer,
        wanted: DeployedActivation,
        is_output: bool = False,
    ) -> object:
        if wanted == DeployedActivation():
            return x
        place = "output" if is_output else "input"
        args = x, wanted, layer.layer.channel_dim, is_output
        return self._called(as_deployed, args, shape, f"{layer.name} {place}")

    def _called(self, operator: object, args: Sequence[object], shape: tuple[int, ...], name: str) -> Value:
        assert callable(operator)
        result = Value(shape)
        self.builder.add(Call(name, operator, tuple(args), {}, result))
        return result


def as_deployed(x: Tensor, wanted: DeployedActivation, channel_dim: int, is_output: bool) -> Tensor:
    """Round an activation to its grid and prune it, as the forward graph of its layer does."""
    pattern, grid = wanted.pattern, wanted.grid
    if is_output and (pattern is not None or (grid is not None and not grid.signed)):
        x = x.relu()
    x = x if grid is None else to_grid(x, step_of(wanted), grid.bits, grid.signed)
    return x if pattern is None else OPERATORS["greedy_by_value"].prune(x, pattern, channel_dim, None)


def scale_and_shift(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Compute a norm as a layer absorbs it."""
    shape = -1, *(1,) * (x.dim() - 2)
    return x * gain.view(shape) + shift.view(shape)


def _window(layer: RuntimeLayer) -> Window:
    geometry = layer.layer
    if not isinstance(geometry, ConvLayer):
        return Window()
    kernel, stride, dilation = (
        _pair(sizes) for sizes in (geometry.weight_shape[2:], geometry.stride, geometry.dilation)
    )
    # Padding that a convolution cannot do itself stands before it in the graph.
    return Window(kernel, stride, _pair(geometry.padding), dilation)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width
