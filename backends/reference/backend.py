"""The reference backend: dense PyTorch math on pruned operands, on any device. Slow, obvious and trusted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from nmcompile.backends.reference import conv, conv_transpose, linear
from nmcompile.backends.shared.fuse_nodes import bias_gradient_of, split_gradients
from nmcompile.backends.shared.gemm_arguments import GemmTable, gemm_arguments
from nmcompile.errors import LoweringError
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import ConvLayer, ConvTransposeLayer, Layer, LinearLayer, SpatialLayer
from nmcompile.ir.node_meta import meta_of
from nmcompile.ir.protocols import Support

GEMMS: GemmTable = {
    (ops.gemm_forward, LinearLayer): linear.linear_forward,
    (ops.gemm_backward, LinearLayer): linear.linear_input_gradient,
    (ops.gemm_update, LinearLayer): linear.linear_weight_gradient,
    (ops.gemm_forward, ConvLayer): conv.conv_forward,
    (ops.gemm_backward, ConvLayer): conv.conv_input_gradient,
    (ops.gemm_update, ConvLayer): conv.conv_weight_gradient,
    (ops.gemm_forward, ConvTransposeLayer): conv_transpose.conv_transpose_forward,
    (ops.gemm_backward, ConvTransposeLayer): conv_transpose.conv_transpose_input_gradient,
    (ops.gemm_update, ConvTransposeLayer): conv_transpose.conv_transpose_weight_gradient,
}
PARAMETER_GRADIENTS: Mapping[type[Layer], Callable[..., tuple[Tensor, Tensor]]] = {
    ConvLayer: conv.conv_parameter_gradients,
    ConvTransposeLayer: conv_transpose.conv_transpose_parameter_gradients,
}


@dataclass(frozen=True)
class ReferenceBackend:
    """A backend for every node. GEMMs become the operations of eager autograd; prune nodes stay unchanged."""

    name: str = "reference"

    def available(self) -> Support:
        return Support(True, "plain PyTorch")

    def supports(self, node: fx.Node) -> Support:
        return Support(True, "dense math on the pruned operands: no speed-up")

    def lower(self, node: fx.Node) -> None:
        meta = meta_of(node)
        if meta.kind == "prune":
            return
        if (node.target, type(meta.layer)) in GEMMS:
            _lower_gemm(node)
        elif node.target is ops.add_bias:
            # Another backend took its GEMM.
            ops.replace_node(node, add_channels, (*node.args, meta.layer.channel_dim))
        elif node.target is ops.bias_gradient:
            _lower_bias_gradient(node)
        else:
            raise LoweringError(f"layer {meta.layer.name!r}: node {node.name!r} is not an operation of the IR")


def _lower_gemm(node: fx.Node) -> None:
    layer, arguments = meta_of(node).layer, gemm_arguments(node)
    both = PARAMETER_GRADIENTS.get(type(layer)) if node.target is ops.gemm_update else None
    bias = bias_gradient_of(node.args[0]) if both is not None else None
    if both is None or bias is None:
        ops.replace_node(node, GEMMS[node.target, type(layer)], arguments)
    else:
        ops.replace_node(node, both, arguments)
        split_gradients(node, bias)


def _lower_bias_gradient(node: fx.Node) -> None:
    if isinstance(meta_of(node).layer, SpatialLayer):
        ops.replace_node(node, conv.conv_bias_gradient, node.args)
        return
    # Eager sums in another order if the input is not contiguous.
    names = ("input", "input_pruned", "input_quantized")
    input = next(n for n in node.graph.nodes if n.op == "placeholder" and n.target in names)
    ops.replace_node(node, linear.linear_bias_gradient, (*node.args, input))


def add_channels(output: Tensor, bias: Tensor, channel_dim: int) -> Tensor:
    """Compute Y + b with b along the channel dim."""
    return output + (bias if channel_dim == -1 else bias.view(-1, *(1,) * (output.dim() - 2)))
