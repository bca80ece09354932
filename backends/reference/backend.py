"""The reference backend: dense PyTorch math on pruned operands, on any device. Slow, obvious and trusted."""

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from nmcompile.backends.reference import conv, linear
from nmcompile.errors import LoweringError
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import ConvLayer, LinearLayer
from nmcompile.ir.node_meta import KEY, meta_of
from nmcompile.ir.protocols import Support


@dataclass(frozen=True)
class ReferenceBackend:
    """Takes every node. GEMMs become the operations that eager autograd uses; prune nodes stay what they are."""

    name: str = "reference"

    def available(self) -> Support:
        return Support(True, "plain PyTorch")

    def supports(self, node: fx.Node) -> Support:
        return Support(True, "dense math on the pruned operands: no speed-up")

    def lower(self, node: fx.Node) -> None:
        lowerings = {
            ops.gemm_forward: _lower_forward,
            ops.gemm_backward: _lower_backward,
            ops.gemm_update: _lower_update,
            ops.add_bias: _lower_add_bias,
            ops.bias_gradient: _lower_bias_gradient,
        }
        meta = meta_of(node)
        if meta.kind == "prune":
            return
        if node.target not in lowerings:
            raise LoweringError(f"layer {meta.layer.name!r}: node {node.name!r} is no operation of the IR")
        lowerings[node.target](node)


def _geometry(node: fx.Node) -> tuple[Any, ...]:
    layer = meta_of(node).layer
    if isinstance(layer, LinearLayer):
        return (layer.transposed,)
    assert isinstance(layer, ConvLayer)
    return list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups


def _is_conv(node: fx.Node) -> bool:
    return isinstance(meta_of(node).layer, ConvLayer)


def _lower_forward(node: fx.Node) -> None:
    """Fuses the bias that is added to nothing but this GEMM: eager adds it inside the kernel, with other rounding."""
    bias_nodes = [user for user in node.users if user.target is ops.add_bias]
    bias = None
    if bias_nodes and len(node.users) == 1:
        bias = bias_nodes[0].args[1]
        bias_nodes[0].replace_all_uses_with(node)
        node.graph.erase_node(bias_nodes[0])
    target = conv.conv_forward if _is_conv(node) else linear.linear_forward
    ops.replace_node(node, target, (*node.args, bias, *_geometry(node)))


def _lower_backward(node: fx.Node) -> None:
    target = conv.conv_input_gradient if _is_conv(node) else linear.linear_input_gradient
    ops.replace_node(node, target, (*node.args, *_geometry(node)))


def _lower_update(node: fx.Node) -> None:
    bias = _same_gradient_bias(node)
    if not _is_conv(node):
        ops.replace_node(node, linear.linear_weight_gradient, (*node.args, *_geometry(node)))
    elif bias is None:
        ops.replace_node(node, conv.conv_weight_gradient, (*node.args, *_geometry(node)))
    else:
        _fuse_parameter_gradients(node, bias)


def _same_gradient_bias(node: fx.Node) -> fx.Node | None:
    """The bias gradient that reads the very tensor that the update GEMM reads, so that one kernel gives both."""
    gradient = node.args[0]
    assert isinstance(gradient, fx.Node)
    return next((user for user in gradient.users if user.target is ops.bias_gradient), None)


def _fuse_parameter_gradients(node: fx.Node, bias: fx.Node) -> None:
    ops.replace_node(node, conv.conv_parameter_gradients, (*node.args, *_geometry(node)))
    users = list(node.users)
    with node.graph.inserting_after(node):
        weight_gradient = node.graph.call_function(operator.getitem, (node, 0))
        bias_gradient = node.graph.call_function(operator.getitem, (node, 1))
    for user in users:
        user.replace_input_with(node, weight_gradient)
    for item in (weight_gradient, bias_gradient):
        item.meta[KEY] = replace(meta_of(node), kind="view")
    bias.replace_all_uses_with(bias_gradient)
    node.graph.erase_node(bias)


def _lower_add_bias(node: fx.Node) -> None:
    """A bias whose GEMM another backend took."""
    ops.replace_node(node, add_channels, (*node.args, meta_of(node).layer.channel_dim))


def _lower_bias_gradient(node: fx.Node) -> None:
    if _is_conv(node):
        ops.replace_node(node, conv.conv_bias_gradient, node.args)
        return
    # Eager sums in another order where the input is not contiguous.
    names = ("input", "input_pruned", "input_quantized")
    input = next(n for n in node.graph.nodes if n.op == "placeholder" and n.target in names)
    ops.replace_node(node, linear.linear_bias_gradient, (*node.args, input))


def add_channels(output: Tensor, bias: Tensor, channel_dim: int) -> Tensor:
    """Y + b with b along the channel dim."""
    return output + (bias if channel_dim == -1 else bias.view(-1, *(1,) * (output.dim() - 2)))
