"""The cuSPARSELt backend: forward and backward GEMMs with 2:4 weights on sparse tensor cores."""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from nmcompile.backends.choices import latest
from nmcompile.backends.cusparselt import operators
from nmcompile.backends.cusparselt.support import cusparselt_support, pattern_support
from nmcompile.backends.reference import ReferenceBackend, conv, linear
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import ConvLayer, Layer
from nmcompile.ir.protocols import Support

SPARSE: dict[Any, Any] = {
    linear.linear_forward: operators.linear_forward,
    linear.linear_input_gradient: operators.linear_input_gradient,
    conv.conv_forward: operators.pointwise_forward,
    conv.conv_input_gradient: operators.pointwise_input_gradient,
}
AXES: dict[Any, str] = {ops.gemm_forward: "in", ops.gemm_backward: "out"}
UPDATE = (
    "dY changes in every step, and the library compresses it more slowly than the sparse product could repay; there is "
    "no packer for its format here"
)
_numbers = itertools.count()


@dataclass(frozen=True)
class CusparseltBackend:
    """Takes the forward and backward GEMMs of linear layers and 1x1 convolutions whose weight keeps two of four.

    Whether the sparse or the dense kernel runs is measured when the GEMM first does, the compression of the weight
    included. On other devices than CUDA's and in other dtypes than float16 and bfloat16 they run as the reference does.
    """

    name: str = "cusparselt"

    def available(self) -> Support:
        return cusparselt_support()

    def supports(self, node: fx.Node) -> Support:
        if node.target is ops.gemm_update:
            return Support(False, UPDATE)
        if node.target not in AXES:
            return Support(False, "cuSPARSELt only multiplies")
        return _layer_support(node.meta["layer"]) if (found := _weight_support(node)).ok else found

    def lower(self, node: fx.Node) -> None:
        """The reference backend's node, with a choice of the kernel."""
        name = f"{node.meta['layer'].name} {node.meta['phase'].value} cusparselt {next(_numbers)}"
        ReferenceBackend().lower(node)
        # Linear layers keep whether their weight is transposed; the geometry of a 1x1 convolution says nothing.
        kept = node.args[:3] if isinstance(node.meta["layer"], ConvLayer) else node.args
        ops.replace_node(node, SPARSE[node.target], (*kept, name))
        node.meta["choice"] = partial(latest, name)


def _weight_support(node: fx.Node) -> Support:
    weight: Any = node.args[1]
    while weight.meta.get("kind") == "quantize":
        weight = weight.args[0]
    row = weight.meta.get("row")
    if row is None or row.pattern is None:
        return Support(False, "the weight is not pruned")
    if row.axis != AXES[node.target]:
        return Support(False, f"the weight is pruned along {row.axis}, not along the sum of this GEMM")
    return pattern_support(row.pattern)


def _layer_support(layer: Layer) -> Support:
    if not isinstance(layer, ConvLayer):
        return Support(True)
    plain = (1,) * layer.spatial_dims, (0,) * layer.spatial_dims
    geometry = layer.weight_shape[2:], layer.stride, layer.padding
    if layer.groups > 1 or geometry != (plain[0], *plain):
        return Support(False, "only 1x1 convolutions are a product without a matrix of windows, which would not pay")
    return Support(True)
