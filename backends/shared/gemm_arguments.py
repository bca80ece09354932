"""The arguments of a layer's three GEMMs, in the order in which the functions of every backend take them.

    GEMM       linear layer       convolution                            transposed convolution
    forward    X W b transposed   X W b  stride padding dilation groups  X W b  stride padding dilation output_padding
    backward   dY W transposed    dY W X stride padding dilation groups  dY W X stride padding dilation output_padding
    update     dY X transposed    dY X W stride padding dilation groups  dY X W stride padding dilation output_padding

A backward convolution reads the shape and the memory format of X, an update those of W.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, fx
from torch.fx.node import Argument

from nmcompile.ir import operations as ops
from nmcompile.ir.layers import ConvLayer, ConvTransposeLayer, Layer, LinearLayer
from nmcompile.ir.node_meta import meta_of

GemmTable = Mapping[tuple[object, type[Layer]], Callable[..., Tensor]]
"""A backend's functions by GEMM and kind of layer."""


def gemm_arguments(node: fx.Node) -> tuple[Argument, ...]:
    """Return the arguments of a GEMM that is not lowered yet. A forward GEMM takes its bias from the node that adds it.

    The bias is None if the layer has none, or if nodes other than that one read the product.
    """
    bias = (_take_bias(node),) if node.target is ops.gemm_forward else ()
    return *node.args, *bias, *geometry(meta_of(node).layer)


def _take_bias(node: fx.Node) -> Argument:
    """Remove the node that adds the bias: eager adds it inside the kernel, which rounds differently."""
    adding = [user for user in node.users if user.target is ops.add_bias]
    if not adding or len(node.users) > 1:
        return None
    bias = adding[0].args[1]
    adding[0].replace_all_uses_with(node)
    node.graph.erase_node(adding[0])
    return bias


def geometry(layer: Layer) -> tuple[Argument, ...]:
    """Return the arguments of a GEMM that are no tensors."""
    if isinstance(layer, LinearLayer):
        return (layer.transposed,)
    assert isinstance(layer, ConvLayer | ConvTransposeLayer)
    last = list(layer.output_padding) if isinstance(layer, ConvTransposeLayer) else layer.groups
    return list(layer.stride), list(layer.padding), list(layer.dilation), last
