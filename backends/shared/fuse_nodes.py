"""Nodes that a GEMM takes into itself: what masks its weight, and what prunes its gradient.

`node.meta["fused"]` then is the plan row of the node that is gone, and `node.meta["fused_operand"]` gives what it gave.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

from nmcompile.ir import operations as ops

Rule = tuple[Any, ...]
"""Operator, N, M, axis and key of a prune node."""


def take_mask(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The weight, the second argument, and the mask that the kernel shall apply itself, if nobody else reads that."""
    pruned = node.args[1]
    assert isinstance(pruned, fx.Node)
    if pruned.target is not ops.apply_mask or len(pruned.users) > 1:
        return pruned, None
    node.meta.update(fused=pruned.meta["row"], fused_operand=_masked_weight)
    weight, mask = pruned.args
    assert isinstance(weight, fx.Node) and isinstance(mask, fx.Node)
    node.args = (node.args[0], weight, *node.args[2:])
    node.graph.erase_node(pruned)
    return weight, mask


def pruned_alone(node: fx.Node) -> fx.Node | None:
    """What prunes the gradient (the first argument) for this GEMM alone."""
    pruned = node.args[0]
    assert isinstance(pruned, fx.Node)
    return pruned if pruned.target is ops.prune and len(pruned.users) == 1 else None


def take_pruning(node: fx.Node, pruned: fx.Node, prune: Callable[..., Any]) -> tuple[fx.Node, Rule]:
    """The gradient that `pruned` would prune, and how.

    Args:
        node: of the update GEMM; it will be called with the gradient, the input and the rule.
        pruned: see `pruned_alone`.
        prune: what the backend prunes with, called as `nmcompile.ir.operations.prune`.
    """
    dense, operator, n_keep, block, axis, _, *key = pruned.args
    assert isinstance(dense, fx.Node)
    node.meta.update(fused=pruned.meta["row"], fused_operand=partial(_pruned_gradient, prune))
    node.args = (dense, *node.args[1:])
    node.graph.erase_node(pruned)
    return dense, (operator, n_keep, block, axis, *(key or (None,)))


def _masked_weight(_: Any, weight: Any, mask: Any, *rest: Any) -> Any:
    return ops.apply_mask(weight, mask)


def _pruned_gradient(prune: Callable[..., Any], gradient: Any, _: Any, *rule_and_rest: Any) -> Any:
    operator, n_keep, block, axis, key = rule_and_rest[:5]
    return prune(gradient, operator, n_keep, block, axis, -1, key)
