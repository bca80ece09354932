"""Layers with a grid for an activation -> quantized inputs, and outputs quantized after their ReLU or directly.

    Conv(x, w)        ->  Conv(Dequantize(Clip(Quantize(x, scale, 0), low, high)), w)
    Relu(Conv(x, w))  ->  Dequantize(Clip(Quantize(Relu(Conv(x, w)), scale, 0), low, high))
    Conv(x, w)        ->  Dequantize(Clip(Quantize(Conv(x, w), scale, zero), low, high))

The Clip is one of integers: a Clip of floats before the Quantize would rule out ONNX Runtime's integer kernels. So the
bounds of a Clip that a model has there, as a ReLU6 does, become bounds of the integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from nmcompile.errors import ExportError
from nmcompile.export.deployed_layer import DeployedActivation
from nmcompile.export.write.build_nodes import add_initializer, insert_before, only_rectified
from nmcompile.export.write.clean_graph import drop_identities
from nmcompile.export.write.find_layers import CONVS, LayerNode
from nmcompile.export.write.prune_activations import prune_activation
from nmcompile.export.write.prune_integers import prune_integers
from nmcompile.pruning.pattern import NMPattern
from nmcompile.quantization import Grid


def quantize_activations(model: ir.Model, sites: Sequence[LayerNode], target: str) -> None:
    """Prune and quantize the inputs and outputs of all sites, in place; equal inputs once.

    Raises:
        ExportError: an output to be quantized after its ReLU that something else reads.
    """
    done: dict[tuple[ir.Value, DeployedActivation, bool], ir.Value] = {}
    for site in sites:
        x, wanted = site.node.inputs[0], site.deployed.input
        assert x is not None
        key = (x, wanted, site.node.op_type in CONVS)
        if key not in done:
            done[key] = _Place(model, site, site.node, "").put(x, wanted, target)
        site.node.replace_input_with(0, done[key])
    for site in sites:
        if site.deployed.output != DeployedActivation():
            _quantize_behind(model, site, target)
    drop_identities(model)


def is_emulated(grid: Grid, target: str) -> bool:
    """Return whether the grid needs floats: TensorRT has no unsigned integers, and its INT8 ends at 127."""
    return target == "tensorrt" and grid.high > np.iinfo(np.int8).max


def _quantize_behind(model: ir.Model, site: LayerNode, target: str) -> None:
    wanted, result = site.deployed.output, _result(site)
    if target == "onnxruntime" and wanted.grid is not None and wanted.grid.signed and only_rectified(result):
        # Half of the grid is not used. After the ReLU its rest fits the operator that ONNX Runtime makes of both.
        wanted = replace(wanted, grid=Grid(wanted.grid.bits - 1, signed=False))
    is_rectified = wanted.pattern is not None or (wanted.grid is not None and not wanted.grid.signed)
    for activation in _rectified(site, result) if is_rectified else (result,):
        # A node to insert the new nodes before, and to carry the name that the graph's output needs.
        end = ir.Node("", "Identity", [activation], name=f"{site.name}.output")
        end.outputs[0].shape, end.outputs[0].type = activation.shape, activation.type
        producer = activation.producer()
        assert producer is not None
        producer.append(end)
        name, activation.name = activation.name, f"{activation.name}.dense"
        others = ((user, operand) for user, operand in activation.uses() if user is not end)
        for user, operand in tuple(others):
            user.replace_input_with(operand, end.outputs[0])
        outputs = model.graph.outputs
        for index, output in enumerate(outputs):
            if output is activation:
                outputs[index] = end.outputs[0]
        end.outputs[0].name = name
        end.replace_input_with(0, _Place(model, site, end, "output_").put(activation, wanted, target))


def _result(site: LayerNode) -> ir.Value:
    """Return the output of the layer's node, or of the bias after it if that is a node of its own."""
    output = site.node.outputs[0]
    readers = list(output.consumers())
    if site.node.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "Add":
        return output
    size = site.deployed.layer.out_features
    others = (value for value in readers[0].inputs if value is not output and value is not None)
    biases = (value for value in others if value.const_value is not None and value.const_value.size == size)
    return readers[0].outputs[0] if site.deployed.layer.has_bias and any(biases) else output


def _rectified(site: LayerNode, result: ir.Value) -> list[ir.Value]:
    if not only_rectified(result):
        raise ExportError(
            f"layer {site.name!r}: its output is to be pruned and quantized after a ReLU, but the graph reads it "
            "elsewhere too; leave the layer out with CompileConfig.layers, or take placement='operand'"
        )
    return [relu.outputs[0] for relu in result.consumers()]


@dataclass(frozen=True)
class _Place:
    """Place where an activation of a site is pruned and quantized: before `node`, with names that begin with `kind`."""

    model: ir.Model
    site: LayerNode
    node: ir.Node
    kind: str

    def put(self, x: ir.Value, wanted: DeployedActivation, target: str) -> ir.Value:
        if wanted.grid is None:
            return self._pruned(x, wanted.pattern)
        assert wanted.scale is not None
        scale = self._constant("scale", np.float32(wanted.scale))
        if is_emulated(wanted.grid, target):
            return self._pruned(self._emulated(x, scale, wanted.grid), wanted.pattern)
        if wanted.pattern is None or target == "onnxruntime":
            return self._on_grid(x, scale, wanted.grid, wanted.pattern, target)
        # TensorRT has integers between a Quantize and a Dequantize only, so it prunes rounded floats.
        return self._quantized(self._pruned(self._emulated(x, scale, wanted.grid), wanted.pattern), scale)

    def _pruned(self, x: ir.Value, pattern: NMPattern | None) -> ir.Value:
        if pattern is None:
            return x
        return prune_activation(self.model, self.node, x, pattern, self._layout, self._name("prune"))

    @property
    def _layout(self) -> str:
        return "Channels" if self.site.node.op_type in CONVS else "Features"

    def _on_grid(self, x: ir.Value, scale: ir.Value, grid: Grid, pattern: NMPattern | None, target: str) -> ir.Value:
        dtype = np.dtype(np.uint8 if target == "onnxruntime" else np.int8)
        offset = 128 if dtype == np.uint8 and grid.signed else 0
        zero = self._constant("zero_point", dtype.type(offset))
        shape = x.shape
        x, low, high = _unclipped(x, scale, grid)
        x = self._insert("QuantizeLinear", [x, scale, zero], "quantize")
        x = self._clipped(x, low + offset, high + offset, dtype)
        if pattern is not None:
            x.shape, x.type = shape, ir.TensorType(ir.DataType.UINT8)
            x = prune_integers(self.model, self.node, x, grid.high, pattern, self._layout, self._name("prune"))
        return self._insert("DequantizeLinear", [x, scale, zero], "dequantize")

    def _quantized(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """Return floats that are on their grid already between a Quantize and a Dequantize."""
        zero = self._constant("zero_point", np.int8(0))
        x = self._insert("QuantizeLinear", [x, scale, zero], "quantize")
        return self._insert("DequantizeLinear", [x, scale, zero], "dequantize")

    def _clipped(self, x: ir.Value, low: int, high: int, dtype: np.dtype[np.generic]) -> ir.Value:
        ends = [self._constant(end, dtype.type(number)) for end, number in (("low", low), ("high", high))]
        return self._insert("Clip", [x, *ends], "clip")

    def _emulated(self, x: ir.Value, scale: ir.Value, grid: Grid) -> ir.Value:
        x = self._insert("Div", [x, scale], "divide")
        x = self._insert("Round", [x], "round")
        x = self._clipped(x, grid.low, grid.high, np.dtype(np.float32))
        return self._insert("Mul", [x, scale], "multiply")

    def _name(self, step: str) -> str:
        return f"{self.site.name}.{self.kind}{step}"

    def _constant(self, what: str, content: np.generic) -> ir.Value:
        return add_initializer(self.model, f"{self.site.name}.{self.kind or 'input_'}{what}", content)

    def _insert(self, op_type: str, inputs: Sequence[ir.Value], step: str) -> ir.Value:
        return insert_before(self.node, op_type, inputs, self._name(step))


def _unclipped(x: ir.Value, scale: ir.Value, grid: Grid) -> tuple[ir.Value, int, int]:
    """Return what a Clip before a Quantize reads, and the grid's ends within its bounds: rounding keeps the order."""
    clip, step = x.producer(), scale.const_value
    if clip is None or clip.op_type != "Clip" or len(clip.inputs) != 3 or step is None:
        return x, grid.low, grid.high
    source, *bounds = clip.inputs
    constants = [None if bound is None else bound.const_value for bound in bounds]
    numbers = [one.numpy() / step.numpy() for one in constants if one is not None]
    if source is None or len(numbers) < 2:
        return x, grid.low, grid.high
    low, high = (int(np.clip(np.round(number), grid.low, grid.high)) for number in numbers)
    return source, low, high
