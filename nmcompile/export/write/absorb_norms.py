"""BatchNormalization after a layer -> a gain and a shift per out-channel, for the weight's scale and the bias.

    BatchNorm(W x + b)  ->  gain ∘ W x + (gain ∘ (b - mean) + beta),    gain = gamma / sqrt(variance + epsilon)

Zeros stay zeros and integers stay integers: only the scale of each channel changes, and the sign where gamma < 0.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from nmcompile.export.write.find_layers import Doubles, LayerNode, module_of


@dataclass(frozen=True)
class Affine:
    """An affine map after a GEMM without bias, float64 `(out-channels,)` each, and the module that it came from."""

    gain: Doubles
    shift: Doubles
    module: str


def absorb_norm(site: LayerNode) -> Affine | None:
    """Remove the norm that alone reads the layer's output from the graph, in place; None if there is none.

    A norm that reads an output on its grid stays.
    """
    output = site.node.outputs[0]
    norm = _norm_behind(output)
    if norm is None or output.is_graph_output() or not _channels_fit(site):
        return None
    if site.deployed.output.grid is not None and not site.absorbs(module_of(norm)):
        return None
    constants = [value.const_value for value in norm.inputs[1:] if value is not None]
    if len(constants) != 4 or any(constant is None for constant in constants):
        return None
    gamma, beta, mean, variance = (c.numpy().astype(np.float64) for c in constants if c is not None)
    gain = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    affine = Affine(gain, gain * (_bias(site.node) - mean) + beta, module_of(norm))
    _bypass(norm, output)
    return affine


def _norm_behind(output: ir.Value) -> ir.Node | None:
    uses = output.uses()
    if len(uses) != 1:
        return None
    (node, operand), *_ = uses
    return node if node.op_type == "BatchNormalization" and operand == 0 else None


def _channels_fit(site: LayerNode) -> bool:
    """Return whether dim 1, which a norm takes for channels, is the layer's channel dim."""
    shape = site.node.outputs[0].shape
    return site.node.op_type in ("Conv", "Gemm") or (shape is not None and len(shape) == 2)


def _bias(node: ir.Node) -> Doubles | float:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return 0.0 if bias is None or bias.const_value is None else bias.const_value.numpy().astype(np.float64)


def _bypass(norm: ir.Node, output: ir.Value) -> None:
    result = norm.outputs[0]
    name, result.name = result.name, f"{result.name}.absorbed"
    ir.convenience.replace_all_uses_with(result, output, replace_graph_outputs=True)
    assert norm.graph is not None
    norm.graph.remove(norm, safe=True)
    output.name, output.shape = name, result.shape
