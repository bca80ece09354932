"""The CPU backend: native kernels that prune, find exact transposable 2:4 masks, and multiply 2:4 sparse operands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx
from torch.fx.node import Argument

from nmcompile.backends.cpu import conv, linear
from nmcompile.backends.cpu.conv_on_grid import conv_forward_on_grid
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.linear_on_grid import linear_forward_on_grid
from nmcompile.backends.cpu.packed_integers import BITS
from nmcompile.backends.cpu.prune import PRUNE_MASK, cpu_prune_mask, prune_natively, prune_support
from nmcompile.backends.cpu.transposable import PATTERN, TRANSPOSABLE_MASK
from nmcompile.backends.shared.fuse_nodes import pruned_alone, take_mask, take_pruning
from nmcompile.backends.shared.gemm_arguments import GemmTable, gemm_arguments
from nmcompile.backends.shared.sparse_operand import OPERAND, operand_support, pruned_row
from nmcompile.ir import operations as ops
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer
from nmcompile.ir.node_meta import meta_of, row_of, update_meta
from nmcompile.ir.protocols import OTHER_KIND, Support

GEMMS: GemmTable = {
    (ops.gemm_forward, LinearLayer): linear.linear_forward,
    (ops.gemm_backward, LinearLayer): linear.linear_input_gradient,
    (ops.gemm_update, LinearLayer): linear.linear_weight_gradient,
    (ops.gemm_forward, ConvLayer): conv.conv_forward,
    (ops.gemm_backward, ConvLayer): conv.conv_input_gradient,
    (ops.gemm_update, ConvLayer): conv.conv_weight_gradient,
}

GEMMS_ON_GRIDS: Mapping[type[Layer], Callable[..., Tensor]] = {
    LinearLayer: linear_forward_on_grid,
    ConvLayer: conv_forward_on_grid,
}
"""Forward GEMMs whose operands fit packed integers."""


@dataclass(frozen=True)
class CpuBackend:
    """A backend for prune nodes with a native kernel, `transposable` masks of 2:4, and GEMMs with a 2:4 operand.

    On any device except the CPU they run as in the reference.
    """

    name: str = "cpu"

    def available(self) -> Support:
        return kernel_support()

    def supports(self, node: fx.Node) -> Support:
        if node.target in OPERAND:
            return gemm_support(node)
        if node.target is ops.apply_mask:
            return mask_support(node)
        return _operator_support(node) if node.target in (ops.prune, ops.prune_mask) else OTHER_KIND

    def lower(self, node: fx.Node) -> None:
        if node.target is ops.apply_mask:
            # The graph only applies the mask. It is computed when it is refreshed, outside the graph.
            update_meta(node, mask_kernel=mask_kernel(node))
        elif node.target is ops.prune_mask:
            ops.replace_node(node, cpu_prune_mask, node.args)
        elif node.target is ops.prune:
            ops.replace_node(node, prune_natively, node.args)
        else:
            _lower_gemm(node)


def gemm_support(node: fx.Node) -> Support:
    """Return whether there is a sparse kernel for a GEMM node that is not lowered yet."""
    layer, support = meta_of(node).layer, operand_support(node)
    is_volume = isinstance(layer, ConvLayer) and layer.spatial_dims > 2
    if is_volume or (node.target, type(layer)) not in GEMMS:
        return Support(False, f"no sparse kernel for {layer.kind}")
    return kernel_support() if support.ok else support


def _lower_gemm(node: fx.Node) -> None:
    """Make a node choose its kernel, which masks or prunes the sparse operand itself if it can."""
    row, meta = pruned_row(node), meta_of(node)
    slot = ChoiceSlot(f"{meta.layer.name} {meta.phase.value}")
    target, arguments = GEMMS[node.target, type(meta.layer)], gemm_arguments(node)
    if _has_small_integers(node):
        slot.prunes = isinstance(meta.layer, ConvLayer) and _reads_pruned_codes(node)
        target, arguments = GEMMS_ON_GRIDS[type(meta.layer)], _arguments_on_grid(node, arguments)
    elif node.target is not ops.gemm_update:
        first, _, *rest = arguments
        arguments = first, *_weight_and_mask(node), *rest
    elif _prunes_while_packing(node):
        target, arguments = linear.linear_pruned_weight_gradient, _pruned_update_arguments(node, arguments)
    else:
        assert row is not None and row.pattern is not None
        arguments = *arguments, row.axis, row.pattern.block
    ops.replace_node(node, target, (*arguments, slot.name))
    update_meta(node, choice=slot)


def _operator_support(node: fx.Node) -> Support:
    """Return whether there is a kernel for the operator and the pattern of a prune node."""
    operator, n_keep, block = node.args[1:4]
    assert isinstance(operator, str) and isinstance(n_keep, int) and isinstance(block, int)
    return prune_support(operator, n_keep, block)


def _prunes_while_packing(node: fx.Node) -> bool:
    """Return whether only a linear layer's update reads the pruned gradient, and a kernel has its operator."""
    is_linear, pruned = isinstance(meta_of(node).layer, LinearLayer), pruned_alone(node)
    return is_linear and pruned is not None and _operator_support(pruned).ok


def _pruned_update_arguments(node: fx.Node, arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
    """Return the arguments of an update that prunes the gradient while packing it."""
    pruned = pruned_alone(node)
    assert pruned is not None
    dense, rule = take_pruning(node, pruned, prune_natively)
    _, input, transposed = arguments
    return dense, input, *rule, transposed


def _has_small_integers(node: fx.Node) -> bool:
    """Return whether a forward GEMM reads input and masked weight from grids that fit packed integers."""
    input, quantized, *_ = node.args
    if not (node.target is ops.gemm_forward and _is_on_grid(input) and _is_on_grid(quantized)):
        return False
    assert isinstance(quantized, fx.Node)
    pruned, _, _, signed = quantized.args
    assert isinstance(pruned, fx.Node)
    is_read_once = len(quantized.users) == len(pruned.users) == 1
    return bool(signed) and pruned.target is ops.apply_mask and is_read_once


def _reads_pruned_codes(node: fx.Node) -> bool:
    """Return whether the GEMM's input is the layer's, of whose codes the four largest of eight channels are kept."""
    on_grid = node.args[0]
    assert isinstance(on_grid, fx.Node)
    pruned, *grid = on_grid.args
    if not isinstance(pruned, fx.Node) or pruned.target is not ops.apply_mask:
        return False
    input, mask = pruned.args
    if not isinstance(mask, fx.Node) or mask.target not in (ops.prune_mask, cpu_prune_mask):
        return False
    ranked, *rule = mask.args
    is_ranked = isinstance(ranked, fx.Node) and ranked.target is ops.to_grid and list(ranked.args) == [input, *grid]
    is_whole = getattr(input, "target", None) == "input" and getattr(grid[0], "target", None) == "input_step"
    channels = meta_of(node).layer.in_features * meta_of(node).layer.groups
    is_unsigned = not grid[-1]
    return is_ranked and is_whole and is_unsigned and rule == ["greedy_by_value", 4, 8, 1] and channels % 8 == 0


def _is_on_grid(operand: Argument) -> bool:
    if not isinstance(operand, fx.Node) or operand.target is not ops.to_grid:
        return False
    bits = operand.args[2]
    return isinstance(bits, int) and bits <= BITS


def _arguments_on_grid(node: fx.Node, arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
    """Return the arguments of a forward GEMM that masks the weight and puts it on its grid itself."""
    input, quantized, bias, *geometry = arguments
    assert isinstance(input, fx.Node) and isinstance(quantized, fx.Node)
    masked, step, bits, _ = quantized.args
    node.args = (input, masked)
    node.graph.erase_node(quantized)
    _, input_step, *input_grid = input.args
    return input, *_weight_and_mask(node), step, input_step, bias, bits, *input_grid, *geometry


def _weight_and_mask(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return the weight and the mask that the kernel applies itself, and remove the node that would apply it."""
    pruned = node.args[1]
    assert isinstance(pruned, fx.Node)
    weight, mask = take_mask(node)
    if mask is not None and kernel_support().ok:
        update_meta(node, mask_kernel=mask_kernel(pruned))
    return weight, mask


def mask_support(node: fx.Node) -> Support:
    """Return whether there is a kernel for the mask that a node applies to a weight."""
    if not mask_kernel(node):
        return Support(False, "no native kernel for masks except greedy ones, and exact transposable ones of 2:4")
    return kernel_support()


def mask_kernel(node: fx.Node) -> str:
    """Return the name of the kernel that computes the mask of a weight; "" if there is none."""
    row = row_of(node)
    if row is None or row.operand != "weight" or row.pattern is None:
        return ""
    if (row.operator, row.pattern) == ("transposable", PATTERN):
        return TRANSPOSABLE_MASK
    pattern = row.pattern.n_keep, row.pattern.block
    return PRUNE_MASK if row.operator == "greedy" and prune_support(row.operator, *pattern).ok else ""
