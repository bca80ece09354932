"""Nodes that a GEMM fuses: the mask of its weight, and the pruning of its gradient.

`NodeMeta.fused` then has the plan row of the removed node, and computes the node's result.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, fx
from torch.fx.node import Argument

from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import Fused, row_of, update_meta

Rule = tuple[Argument, ...]
"""Operator, N, M, axis and key of a prune node."""


def take_mask(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return the weight, and the mask for the kernel to apply if nothing else reads the masked weight."""
    pruned = node.args[1]
    assert isinstance(pruned, fx.Node)
    if pruned.target is not ops.apply_mask or len(pruned.users) > 1:
        return pruned, None
    _fuse(node, pruned, _masked_weight)
    weight, mask = pruned.args
    assert isinstance(weight, fx.Node) and isinstance(mask, fx.Node)
    node.args = (node.args[0], weight, *node.args[2:])
    node.graph.erase_node(pruned)
    return weight, mask


def pruned_alone(node: fx.Node) -> fx.Node | None:
    """Return the node that prunes the gradient (the first argument) for this GEMM alone."""
    pruned = node.args[0]
    assert isinstance(pruned, fx.Node)
    return pruned if pruned.target is ops.prune and len(pruned.users) == 1 else None


def take_pruning(node: fx.Node, pruned: fx.Node, prune: Callable[..., Tensor]) -> tuple[fx.Node, Rule]:
    """Return the gradient that `pruned` would prune, and the rule.

    Args:
        node: the update GEMM; it will be called with the gradient, the input and the rule.
        pruned: see `pruned_alone`.
        prune: the backend's pruning function, called like `nmcompile.ir.operations.prune`.
    """
    dense, operator, n_keep, block, axis, _, *key = pruned.args
    assert isinstance(dense, fx.Node)
    _fuse(node, pruned, partial(_pruned_gradient, prune))
    node.args = (dense, *node.args[1:])
    node.graph.erase_node(pruned)
    return dense, (operator, n_keep, block, axis, *(key or (None,)))


def _fuse(node: fx.Node, pruned: fx.Node, operand: Callable[..., Tensor]) -> None:
    row = row_of(pruned)
    assert row is not None
    update_meta(node, fused=Fused(row, operand))


def _masked_weight(_: Tensor, weight: Tensor, mask: Tensor, *rest: object) -> Tensor:
    return ops.apply_mask(weight, mask)


def _pruned_gradient(prune: Callable[..., Tensor], gradient: Tensor, _: Tensor, *rule_and_rest: object) -> Tensor:
    operator, n_keep, block, axis, key = rule_and_rest[:5]
    return prune(gradient, operator, n_keep, block, axis, -1, key)
