"""The cuSPARSELt backend: GEMMs with a 2:4 operand on sparse tensor cores."""

from dataclasses import dataclass

from torch import fx
from torch.fx.node import Argument

from nmcompile.backends.cusparselt import operators
from nmcompile.backends.cusparselt.library import CUSPARSELT, Library
from nmcompile.backends.cusparselt.update import linear_parameter_gradients, linear_weight_gradient
from nmcompile.backends.shared.fuse_nodes import (
    Rule,
    bias_gradient_of,
    pruned_alone,
    split_gradients,
    take_mask,
    take_pruning,
)
from nmcompile.backends.shared.gemm_arguments import GemmTable, gemm_arguments
from nmcompile.backends.shared.sparse_operand import OPERAND, operand_support, pruned_row
from nmcompile.backends.triton import mask_kernel, prune
from nmcompile.backends.triton.support import KEEP
from nmcompile.ir import operations as ops
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer
from nmcompile.ir.node_meta import meta_of, update_meta
from nmcompile.ir.protocols import OTHER_KIND, Support

GEMMS: GemmTable = {
    (ops.gemm_forward, LinearLayer): operators.linear_forward,
    (ops.gemm_backward, LinearLayer): operators.linear_input_gradient,
    (ops.gemm_forward, ConvLayer): operators.pointwise_forward,
    (ops.gemm_backward, ConvLayer): operators.pointwise_input_gradient,
}


@dataclass(frozen=True)
class CusparseltBackend:
    """A backend for 2:4 GEMMs of linear layers, and the forward and backward 2:4 GEMMs of 1x1 convolutions.

    The sparse and the dense kernel are timed when the GEMM first runs, including the compression of the operand, and
    the faster one runs. On devices other than CUDA's, and in dtypes other than float16 and bfloat16, GEMMs run as in
    the reference.
    """

    library: Library = CUSPARSELT
    name: str = "cusparselt"

    def available(self) -> Support:
        return self.library.support()

    def supports(self, node: fx.Node) -> Support:
        if node.target not in OPERAND:
            return OTHER_KIND
        found = operand_support(node)
        return _layer_support(meta_of(node).layer, node.target is ops.gemm_update) if found.ok else found

    def lower(self, node: fx.Node) -> None:
        meta = meta_of(node)
        slot = ChoiceSlot(f"{meta.layer.name} {meta.phase.value} cusparselt")
        names = self.library.name, slot.name
        update_meta(node, choice=slot)
        if node.target is ops.gemm_update:
            _lower_update(node, names)
        else:
            ops.replace_node(node, GEMMS[node.target, type(meta.layer)], (*_weight_arguments(node), *names))


def _weight_arguments(node: fx.Node) -> tuple[Argument, ...]:
    """Return the arguments of a GEMM with a sparse weight, which masks it itself."""
    pruned = node.args[1]
    assert isinstance(pruned, fx.Node)
    first, _, *rest = gemm_arguments(node)
    weight, mask = take_mask(node)
    if mask is not None:
        update_meta(node, mask_kernel=mask_kernel(pruned))
    # Linear layers pass on whether their weight is transposed; a 1x1 convolution needs no geometry.
    return first, weight, mask, *(rest[:1] if isinstance(meta_of(node).layer, ConvLayer) else rest)


def _lower_update(node: fx.Node, names: tuple[str, str]) -> None:
    """Have a linear layer's update prune the gradient itself if nothing else reads it, and sum it for the bias."""
    row, pruned = pruned_row(node), pruned_alone(node)
    assert row is not None and row.pattern is not None
    dense, input, transposed = gemm_arguments(node)
    rule: Rule = (KEEP, row.pattern.n_keep, row.pattern.block, row.axis, None)
    if pruned is not None:
        dense, rule = take_pruning(node, pruned, prune)
    arguments, bias = (dense, input, *rule, transposed, *names), bias_gradient_of(dense)
    if bias is None:
        ops.replace_node(node, linear_weight_gradient, arguments)
    else:
        ops.replace_node(node, linear_parameter_gradients, arguments)
        split_gradients(node, bias)


def _layer_support(layer: Layer, is_update: bool) -> Support:
    if isinstance(layer, LinearLayer):
        return Support(True)
    if not isinstance(layer, ConvLayer):
        return Support(False, f"no sparse kernel for {layer.kind}")
    plain = (1,) * layer.spatial_dims, (0,) * layer.spatial_dims
    geometry = layer.weight_shape[2:], layer.stride, layer.padding
    if layer.groups > 1 or geometry != (plain[0], *plain):
        return Support(False, "only 1x1 convolutions are a product without a matrix of windows, which would not pay")
    if is_update:
        return Support(False, "a convolution's gradient is pruned across the batch, where neighbours lie far apart")
    return Support(True)
