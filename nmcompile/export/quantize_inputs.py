"""Layers with an input grid -> quantized inputs.

    Conv(x, w)  ->  Conv(Dequantize(Clip(Quantize(x, scale, 0), low, high)), w)

The Clip is one of integers: one of floats in front would keep ONNX Runtime from its integer kernels.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from nmcompile.export.build_nodes import add_initializer, insert_before
from nmcompile.export.find_layers import LayerNode
from nmcompile.export.prune_inputs import prune_input
from nmcompile.ir.deployed import DeployedInput
from nmcompile.quantization import Grid


def quantize_inputs(model: ir.Model, sites: Sequence[LayerNode], target: str) -> None:
    """Prune and quantize the inputs of all sites, in place; equal inputs once."""
    done: dict[tuple[ir.Value, DeployedInput, bool], ir.Value] = {}
    for site in sites:
        x, wanted = site.node.inputs[0], site.deployed.input
        assert x is not None
        key = (x, wanted, site.node.op_type == "Conv")
        if key not in done:
            done[key] = _prepared(model, site, x, target)
        site.node.replace_input_with(0, done[key])


def is_emulated(grid: Grid, target: str) -> bool:
    """Whether the grid needs floats: TensorRT has no unsigned integers, and its INT8 ends at 127."""
    return target == "tensorrt" and grid.high > np.iinfo(np.int8).max


def _prepared(model: ir.Model, site: LayerNode, x: ir.Value, target: str) -> ir.Value:
    wanted = site.deployed.input
    if wanted.pattern is not None:
        x = prune_input(model, site.node, x, wanted.pattern, f"{site.name}.prune")
    if wanted.grid is None:
        return x
    assert wanted.scale is not None
    scale = add_initializer(model, f"{site.name}.input_scale", np.float32(wanted.scale))
    if is_emulated(wanted.grid, target):
        return _emulated(model, site, x, scale, wanted.grid)
    dtype = np.dtype(np.uint8 if target == "onnxruntime" and not wanted.grid.signed else np.int8)
    zero = add_initializer(model, f"{site.name}.input_zero_point", dtype.type(0))
    x = insert_before(site.node, "QuantizeLinear", [x, scale, zero], f"{site.name}.quantize")
    x = _clipped(model, site, x, wanted.grid, dtype)
    return insert_before(site.node, "DequantizeLinear", [x, scale, zero], f"{site.name}.dequantize")


def _clipped(model: ir.Model, site: LayerNode, x: ir.Value, grid: Grid, dtype: np.dtype[np.generic]) -> ir.Value:
    ends = (("low", grid.low), ("high", grid.high))
    low, high = (add_initializer(model, f"{site.name}.input_{end}", dtype.type(n)) for end, n in ends)
    return insert_before(site.node, "Clip", [x, low, high], f"{site.name}.clip")


def _emulated(model: ir.Model, site: LayerNode, x: ir.Value, scale: ir.Value, grid: Grid) -> ir.Value:
    x = insert_before(site.node, "Div", [x, scale], f"{site.name}.divide")
    x = insert_before(site.node, "Round", [x], f"{site.name}.round")
    x = _clipped(model, site, x, grid, np.dtype(np.float32))
    return insert_before(site.node, "Mul", [x, scale], f"{site.name}.multiply")
