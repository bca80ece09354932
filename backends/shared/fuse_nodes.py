"""Nodes that a GEMM fuses: the mask of its weight, the pruning of its gradient, and the sum for the bias.

If it masks or prunes, `NodeMeta.fused` has the plan row of the removed node, and computes the node's result.
"""

from collections.abc import Callable
from functools import partial
from operator import getitem

from torch import Tensor, fx
from torch.fx.node import Argument

from nmcompile.ir import operations as ops
from nmcompile.ir.node_meta import KEY, Fused, NodeMeta, meta_of, row_of, update_meta

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


def bias_gradient_of(gradient: Argument) -> fx.Node | None:
    """Return the node that sums this very gradient for the bias, so one kernel may read it for both."""
    assert isinstance(gradient, fx.Node)
    return next((user for user in gradient.users if user.target is ops.bias_gradient), None)


def split_gradients(node: fx.Node, bias: fx.Node) -> None:
    """Give the readers of dW and of db one each of the two results that the node has now."""
    users, meta = list(node.users), meta_of(node)
    with node.graph.inserting_after(node):
        weight_gradient = node.graph.call_function(getitem, (node, 0))
        bias_gradient = node.graph.call_function(getitem, (node, 1))
    for user in users:
        user.replace_input_with(node, weight_gradient)
    for item in (weight_gradient, bias_gradient):
        item.meta[KEY] = NodeMeta("view", meta.layer, meta.phase, backend=meta.backend)
    bias.replace_all_uses_with(bias_gradient)
    node.graph.erase_node(bias)


def _fuse(node: fx.Node, pruned: fx.Node, operand: Callable[..., Tensor]) -> None:
    row = row_of(pruned)
    assert row is not None
    update_meta(node, fused=Fused(row, operand))


def _masked_weight(_: Tensor, weight: Tensor, mask: Tensor, *rest: object) -> Tensor:
    return ops.apply_mask(weight, mask)


def _pruned_gradient(prune: Callable[..., Tensor], gradient: Tensor, _: Tensor, *rule_and_rest: object) -> Tensor:
    operator, n_keep, block, axis, key = rule_and_rest[:5]
    return prune(gradient, operator, n_keep, block, axis, -1, key)
