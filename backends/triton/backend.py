"""The Triton backend: masks and pruning on CUDA devices; every GEMM stays with the backends that are asked next."""

from dataclasses import dataclass

from torch import Tensor, fx

from nmcompile.backends.triton.operators import MASK_KERNEL, triton_prune
from nmcompile.backends.triton.support import operator_support, triton_support
from nmcompile.ir import operations as ops
from nmcompile.ir.grouping import grouped
from nmcompile.ir.node_meta import row_of, update_meta
from nmcompile.ir.protocols import OTHER_KIND, Support
from nmcompile.pruning.pattern import NMPattern


@dataclass(frozen=True)
class TritonBackend:
    """A backend for prune nodes whose operator and pattern have a kernel, and for `transposable` masks of 2:4.

    Tensors that are not on CUDA, and float64, run as in the reference.
    """

    name: str = "triton"

    def available(self) -> Support:
        return triton_support()

    def supports(self, node: fx.Node) -> Support:
        if node.target in (ops.apply_mask, ops.prune_mask):
            return mask_support(node)
        if node.target is not ops.prune:
            return OTHER_KIND
        operator, n_keep, block = node.args[1:4]
        assert isinstance(operator, str) and isinstance(n_keep, int) and isinstance(block, int)
        return operator_support(operator, NMPattern(n_keep, block))

    def lower(self, node: fx.Node) -> None:
        if node.target is ops.apply_mask:
            update_meta(node, mask_kernel=mask_kernel(node))
        else:
            ops.replace_node(node, prune, node.args)


def mask_support(node: fx.Node) -> Support:
    """Return whether there is a kernel for the mask that a node computes, or applies to a weight."""
    row = row_of(node)
    if row is None or (row.operator, row.pattern) != ("transposable", NMPattern(2, 4)):
        return Support(False, "no Triton kernel for masks except exact transposable ones of 2:4")
    return Support(True)


def mask_kernel(node: fx.Node) -> str:
    """Return the name of the kernel that computes the mask that a node applies; "" if the reference does."""
    return MASK_KERNEL if mask_support(node).ok and triton_support().ok else ""


def prune(
    x: Tensor, operator: str, n_keep: int, block: int, axis: str, channel_dim: int, key: Tensor | None = None
) -> Tensor:
    """Prune with a kernel; the result equals that of `nmcompile.ir.operations.prune` bit for bit."""
    view, dim, restore = grouped(x, axis, channel_dim, block)
    return ops.like(restore(triton_prune(view, operator, n_keep, block, dim, key)), x)
