"""Integers that are rounded to a coarser grid, as sums of a stream are -> a call of a model-local function.

    Clip(Quantize(Dequantize(x, s, z), t, 0), 0, 15)  ->  nmcompile.RoundIntegers(x, s, z, t, 0, 0, 15)

The function consists of these three nodes. A native operator of its name computes no floats.
"""

from collections.abc import Sequence

import onnx_ir as ir

from nmcompile.export.write.find_layers import CONVS, LayerNode
from nmcompile.export.write.local_functions import DOMAIN, add_function, call_channels_last, call_function

ROUND = "RoundIntegers"
INPUTS = ("x", "scale", "zero", "step", "offset", "low", "high")
BODY = ("sum = DequantizeLinear (x, scale, zero)", "q = QuantizeLinear (sum, step, offset)", "y = Clip (q, low, high)")


def round_integers(model: ir.Model, sites: Sequence[LayerNode]) -> None:
    """Replace the nodes before all sites, in place."""
    for site in sites:
        clip = _clip_of(site)
        inputs = None if clip is None else _inputs(clip)
        if clip is not None and inputs is not None:
            _replace(model, clip, inputs, site.node.op_type in CONVS)


def _clip_of(site: LayerNode) -> ir.Node | None:
    """Return the Clip that bounds the integers of a layer's input."""
    node = _before(site.node, "DequantizeLinear")
    node = None if node is None else _before(node)
    if node is not None and node.domain == DOMAIN and not node.op_type.startswith(ROUND):
        node = _before(node)  # it prunes what the Clip bounds
    return node if node is not None and node.op_type == "Clip" else None


def _inputs(clip: ir.Node) -> dict[str, ir.Value] | None:
    """Return the function's inputs; None if the Clip bounds anything but bytes that are rounded from others."""
    quantize = _before(clip, "QuantizeLinear")
    dequantize = None if quantize is None else _before(quantize, "DequantizeLinear")
    if quantize is None or dequantize is None or len(list(quantize.outputs[0].consumers())) > 1:
        return None
    values = [*dequantize.inputs, *quantize.inputs[1:], *clip.inputs[1:]]
    named = {name: value for name, value in zip(INPUTS, values, strict=False) if value is not None}
    constants = [value.const_value for name, value in named.items() if name != "x"]
    numbers = [one for one in constants if one is not None and one.size == 1]
    kinds = [one.dtype for one in numbers]
    return named if kinds.count(ir.DataType.UINT8) == 4 and kinds.count(ir.DataType.FLOAT) == 2 else None


def _replace(model: ir.Model, clip: ir.Node, inputs: dict[str, ir.Value], has_channels: bool) -> None:
    quantize, result = _before(clip), clip.outputs[0]
    assert quantize is not None and quantize.inputs[0] is not None and clip.graph is not None
    inputs["x"].shape, inputs["x"].type = quantize.inputs[0].shape, ir.TensorType(ir.DataType.UINT8)
    add_function(model, ROUND, BODY, INPUTS)
    name, result.name = str(clip.name), f"{result.name}.replaced"
    if has_channels:
        rounded = call_channels_last(model, clip, (ROUND, f"{ROUND}_Channels"), inputs, name)
    else:
        rounded = call_function(clip, ROUND, list(inputs.values()), name)
    for user, operand in tuple(result.uses()):
        user.replace_input_with(operand, rounded)
    clip.graph.remove([clip, quantize], safe=True)


def _before(node: ir.Node, op_type: str = "") -> ir.Node | None:
    """Return the node that a node's first input comes from, if it is of that type."""
    before = None if not node.inputs or node.inputs[0] is None else node.inputs[0].producer()
    return before if before is not None and op_type in ("", before.op_type) else None
