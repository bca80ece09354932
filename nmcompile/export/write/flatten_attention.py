"""Attention of three or five dims -> four dims, which alone ONNX's exporter takes, in an exported program.

attention(q, k, v)  with (windows, batch, heads, tokens, width)
    ->  attention of (windows * batch, heads, tokens, width) each, its first dim split again
"""

from collections.abc import Callable

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.node import Argument

ATEN = torch.ops.aten
ATTENTION = ATEN.scaled_dot_product_attention.default


def flatten_attention(program: ExportedProgram) -> None:
    """Rewrite in place each attention of three dims, and of five if its mask has the same first two or none."""
    for node in list(program.graph.nodes):
        if node.target is not ATTENTION:
            continue
        dims = {operand.meta["val"].dim() for operand in _operands(node)}
        with program.graph.inserting_before(node):
            if dims == {3}:
                _rewrite(node, ATEN.unsqueeze.default, (1,))
                _behind(node, ATEN.squeeze.dim, (1,))
            elif dims == {5} and _shares_first_dims(node):
                first = node.graph.call_function(ATEN.sym_size.int, (node.args[0], 0))
                _rewrite(node, ATEN.flatten.using_ints, (0, 1))
                _behind(node, ATEN.unflatten.int, (0, [first, -1]))
    program.graph_module.recompile()


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return query, key, value, and the mask if there is one."""
    given = [*node.args[:4], node.kwargs.get("attn_mask")]
    return [one for one in given if isinstance(one, fx.Node)]


def _shares_first_dims(node: fx.Node) -> bool:
    first, *others = (operand.meta["val"].shape[:2] for operand in _operands(node))
    return all(str(other) == str(first) for other in others)


def _rewrite(node: fx.Node, target: Callable[..., object], arguments: tuple[Argument, ...]) -> None:
    """Let a node read its operands through another operator."""
    changed = {operand: node.graph.call_function(target, (operand, *arguments)) for operand in _operands(node)}
    node.args = tuple(changed.get(one, one) if isinstance(one, fx.Node) else one for one in node.args)
    node.kwargs = {
        name: changed.get(one, one) if isinstance(one, fx.Node) else one for name, one in node.kwargs.items()
    }


def _behind(node: fx.Node, target: Callable[..., object], arguments: tuple[Argument, ...]) -> None:
    """Let the users of a node read it through another operator."""
    with node.graph.inserting_after(node):
        result = node.graph.call_function(target, (node, *arguments))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
