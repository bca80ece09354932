"""Parameters -> the constants that the runtime multiplies by: zeros and integers in initializers.

    Conv(x, w)  ->  Conv(x, DequantizeLinear(int8 w, scale))

A mask is never a node: runtimes look for zeros in initializers only.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from nmcompile.errors import ExportError
from nmcompile.export.write.absorb_norms import Affine
from nmcompile.export.write.build_nodes import add_initializer, insert_before
from nmcompile.export.write.find_layers import Doubles, LayerNode
from nmcompile.quantization import absorbed_step

OFF_GRID = 1e-3  # steps; float32 rounding of an integer times a step is below 1e-5


def bake_weights(model: ir.Model, sites: Sequence[LayerNode], affines: Sequence[Affine | None]) -> None:
    """Write every layer's weight, and the norm after it, into the graph, in place.

    Args:
        sites: in the graph's order.
        affines: the norm that each site absorbed.

    Raises:
        ExportError: a weight that breaks its pattern or lies off its grid.
    """
    for weight in {site.weight for site in sites}:
        weight.name = f"{weight.name}.dense"
    shared: dict[tuple[ir.Value | None, int | None], ir.Value] = {}
    for site, affine in zip(sites, affines, strict=True):
        key = site.node.inputs[1], _rank(site.node.inputs[0])  # by rank: a 3-d input may give the weight a dim
        operand = None if affine is not None else shared.get(key)
        if operand is None:
            operand = _baked(model, site, affine)
            if affine is None:
                shared[key] = operand
        site.node.replace_input_with(1, operand)
        if affine is not None:
            shift = _rounded_shift(site, affine).astype(_dtype(site))
            _set_bias(site.node, add_initializer(model, f"{site.name}.bias", shift))


def _baked(model: ir.Model, site: LayerNode, affine: Affine | None) -> ir.Value:
    weight = site.deployed.weight
    _check_pattern(site)
    values = site.lay_out(_doubles(weight.values))
    if weight.grid is not None:
        return _quantized(model, site, values, affine)
    if affine is not None:
        values = values * _along(site, affine.gain)
    return add_initializer(model, f"{site.name}.weight", values.astype(_dtype(site)))


def _quantized(model: ir.Model, site: LayerNode, values: Doubles, affine: Affine | None) -> ir.Value:
    """Return integers and a step: one step if the layer has one and absorbed nothing, else one for each out-channel."""
    scale = site.deployed.weight.scale
    assert scale is not None
    is_single = scale.numel() == 1
    steps = (
        _doubles(scale.reshape(()))
        if is_single
        else site.lay_out(_doubles(scale.expand(site.deployed.weight.values.shape)))
    )
    integers = _integers(site, values / steps)
    if affine is None and is_single:
        return _dequantized(model, site, integers, steps)
    gain = np.ones(values.shape[site.out_dim]) if affine is None else affine.gain
    rows = np.moveaxis(np.broadcast_to(steps, values.shape), site.out_dim, 0).reshape(len(gain), -1)[:, 0]
    absorbed = _absorbed(rows, gain)
    alive = absorbed == rows * np.abs(gain)  # a norm with gamma 0 leaves its shift only
    integers = integers * _along(site, np.where(alive, np.sign(gain), 0.0))
    return _dequantized(model, site, integers, absorbed)


def _absorbed(steps: Doubles, gain: Doubles) -> Doubles:
    absorbed: Doubles = absorbed_step(torch.tensor(steps), torch.tensor(gain)).numpy()
    return absorbed


def _rounded_shift(site: LayerNode, affine: Affine) -> Doubles:
    """Return the norm's shift, in whole steps of the accumulator if the model in torch rounds it so."""
    weight, input = site.deployed.weight, site.deployed.input
    if weight.scale is None or input.scale is None or not site.absorbs(affine.module):
        return affine.shift
    step = _absorbed(_doubles(weight.scale).reshape(-1), affine.gain) * np.float32(input.scale)
    rounded: Doubles = np.round(affine.shift / step) * step
    return rounded


def _dequantized(model: ir.Model, site: LayerNode, integers: Doubles, scale: Doubles) -> ir.Value:
    content = add_initializer(model, f"{site.name}.weight_quantized", integers.astype(np.int8))
    step = add_initializer(model, f"{site.name}.weight_scale", np.asarray(scale, np.float32))
    zero = add_initializer(model, f"{site.name}.weight_zero_point", np.zeros(scale.shape, np.int8))
    axes = [ir.AttrInt64("axis", site.out_dim % integers.ndim)] if scale.ndim else []
    return insert_before(site.node, "DequantizeLinear", [content, step, zero], f"{site.name}.weight", attributes=axes)


def _integers(site: LayerNode, ratio: Doubles) -> Doubles:
    grid = site.deployed.weight.grid
    assert grid is not None
    integers: Doubles = np.round(ratio)
    if np.abs(ratio - integers).max(initial=0.0) > OFF_GRID or np.abs(integers).max(initial=0.0) > grid.high:
        raise ExportError(
            f"layer {site.name!r}: its weight of shape {site.deployed.layer.weight_shape} is not on the grid of "
            f"{grid.bits}-bit integers times its scale; quantize it before the export"
        )
    return integers


def _check_pattern(site: LayerNode) -> None:
    weight, layer = site.deployed.weight, site.deployed.layer
    if weight.pattern is None:
        return
    blocks = weight.values.movedim(layer.in_dim, -1)
    blocks = blocks[..., : blocks.shape[-1] // weight.pattern.block * weight.pattern.block]
    kept = torch.count_nonzero(blocks.unflatten(-1, (-1, weight.pattern.block)), dim=-1)
    broken = int((kept > weight.pattern.n_keep).sum())
    if broken:
        raise ExportError(
            f"layer {site.name!r}: {broken} blocks of its weight of shape {layer.weight_shape} break {weight.pattern} "
            f"along in-channels; apply the mask before the export"
        )


def _set_bias(node: ir.Node, bias: ir.Value) -> None:
    if node.op_type == "MatMul":  # of two dims, else no norm would have been absorbed
        node.op_type = "Gemm"
    node.resize_inputs(3)
    node.replace_input_with(2, bias)


def _dtype(site: LayerNode) -> np.dtype[np.generic]:
    """Return the graph's floating dtype."""
    assert site.weight.dtype is not None
    return site.weight.dtype.numpy()


def _rank(x: ir.Value | None) -> int | None:
    return None if x is None or x.shape is None else len(x.shape)


def _along(site: LayerNode, channels: Doubles) -> Doubles:
    """Return per-out-channel values in a shape that broadcasts to the weight that the node reads."""
    dims = len(site.deployed.layer.weight_shape)
    behind = dims - 1 - site.out_dim % dims
    return channels.reshape(-1, *[1] * behind)


def _doubles(x: Tensor) -> Doubles:
    return x.detach().cpu().double().numpy()
