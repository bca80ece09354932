"""The operand that a sparse kernel takes in each GEMM, and whether it keeps two of four along the sum."""

from torch import fx

from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import kind_of, row_of
from nmcompile.ir.plan import Axis, PlanRow
from nmcompile.ir.protocols import Support
from nmcompile.pruning.pattern import NMPattern

# Its position in the node's arguments, and the axes along which its blocks may run.
OPERAND: dict[object, tuple[int, frozenset[Axis]]] = {
    ops.gemm_forward: (1, frozenset({"in"})),
    ops.gemm_backward: (1, frozenset({"out"})),
    ops.gemm_update: (0, frozenset({"auto", "batch", "flat"})),
}


def pruned_row(node: fx.Node) -> PlanRow | None:
    """Return the plan row that pruned the operand of a GEMM node that is not lowered yet, on a grid or not."""
    operand = node.args[OPERAND[node.target][0]]
    while isinstance(operand, fx.Node) and kind_of(operand) == "quantize":
        operand = operand.args[0]
    return row_of(operand) if isinstance(operand, fx.Node) else None


def operand_support(node: fx.Node) -> Support:
    """Return whether the pattern of the operand fits a kernel for two of four."""
    row = pruned_row(node)
    if row is None or row.pattern is None:
        operand = "gradient" if node.target is ops.gemm_update else "weight"
        return Support(False, f"the {operand} is not pruned for this GEMM; the sparse kernel takes no other operand")
    if row.axis not in OPERAND[node.target][1]:
        return Support(False, f"the {row.operand} is pruned along {row.axis}, not along the sum of this GEMM")
    return pattern_support(row.pattern)


def pattern_support(pattern: NMPattern) -> Support:
    """Return whether an operand that obeys the pattern is 2:4."""
    if 4 % pattern.block or pattern.n_keep * 2 > pattern.block:
        return Support(False, f"no sparse kernel for {pattern}, only for patterns that keep two of four")
    return Support(True)
