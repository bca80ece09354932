"""The CPU backend: pruning and exact transposable 2:4 masks by native kernels.

Every GEMM stays with the backends that are asked next.
"""

from dataclasses import dataclass

from torch import Tensor, fx

from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.prune import cpu_prune, prune_support
from nmcompile.backends.cpu.transposable import MASK_KERNEL, PATTERN
from nmcompile.ir import operations as ops
from nmcompile.ir.grouping import grouped
from nmcompile.ir.protocols import Support


@dataclass(frozen=True)
class CpuBackend:
    """Takes the prune nodes whose operator has a native kernel, and `transposable` masks with the pattern 2:4.

    On another device than the CPU they run as the reference does.
    """

    name: str = "cpu"

    def available(self) -> Support:
        return kernel_support()

    def supports(self, node: fx.Node) -> Support:
        if node.target is ops.apply_mask:
            return mask_support(node)
        if node.target is not ops.prune:
            return Support(False, "no native kernel but those that prune")
        operator, n_keep, block = node.args[1:4]
        assert isinstance(operator, str) and isinstance(n_keep, int) and isinstance(block, int)
        return prune_support(operator, n_keep, block)

    def lower(self, node: fx.Node) -> None:
        if node.target is ops.apply_mask:
            # The graph only applies the mask. It is computed when it is refreshed, outside the graph.
            node.meta["mask_kernel"] = MASK_KERNEL
        else:
            ops.replace_node(node, prune_natively, node.args)


def mask_support(node: fx.Node) -> Support:
    """Whether there is a kernel for the mask that a node applies to a weight."""
    row = node.meta.get("row")
    if row is None or (row.operator, row.pattern) != ("transposable", PATTERN):
        return Support(False, "no native kernel for masks but exact transposable ones of 2:4")
    return kernel_support()


def prune_natively(
    x: Tensor, operator: str, n_keep: int, block: int, axis: str, channel_dim: int, key: Tensor | None = None
) -> Tensor:
    """What `nmcompile.ir.operations.prune` gives, bit for bit, with the native kernel."""
    view, dim, restore = grouped(x, axis, channel_dim, block)
    return ops.like(restore(cpu_prune(view, operator, n_keep, block, dim, key)), x)
