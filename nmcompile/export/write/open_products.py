"""Products with a weight that no runtime prunes -> linear and matmul, in an exported program.

einsum("...i,oi->...o", x, W)  ->  linear(x, W)
einsum("bti,eio->beto", x, W)  ->  matmul of x, as (1, b, t, i), and W, as (e, 1, i, o), its dims put in order
matmul(W, x)                   ->  matmul(xᵀ, Wᵀ)ᵀ
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import fx
from torch.export import ExportedProgram

from nmcompile.ir.einsum import WeightEinsum, linear_einsum, weight_einsum

ATEN = torch.ops.aten


def open_products(program: ExportedProgram) -> None:
    """Rewrite each product with a parameter in place: runtimes have no sparse Einsum, nor sparse left operands."""
    parameters = program.graph_signature.inputs_to_parameters
    for node in list(program.graph.nodes):
        with program.graph.inserting_before(node):
            if node.target is ATEN.einsum.default and len(node.args[1]) == 2:
                _open_einsum(node, [operand.name in parameters for operand in node.args[1]])
            elif node.target is ATEN.matmul.default and _is_left(node, parameters):
                _turn(node)
    program.graph_module.recompile()


def _open_einsum(node: fx.Node, are_parameters: list[bool]) -> None:
    equation, operands = cast(tuple[str, list[fx.Node]], node.args)
    number = next((i for i in (1, 0) if are_parameters[i]), None)
    if number is None:
        return
    is_out_in = linear_einsum(equation, number)
    x, weight = operands[1 - number], operands[number]
    if is_out_in is not None:
        node.target = ATEN.linear.default if is_out_in else ATEN.matmul.default
        node.args = x, weight
    elif (found := weight_einsum(equation, number)) is not None:
        _open_weight_einsum(node, found, x, weight)


def _open_weight_einsum(node: fx.Node, found: WeightEinsum, x: fx.Node, weight: fx.Node) -> None:
    """Multiply (stack, ..., in) by (stack, 1, ..., in, out)."""
    call, letters = node.graph.call_function, found.input
    if found.stack and found.stack not in letters:
        x, letters = call(ATEN.unsqueeze.default, (x, 0)), found.stack + letters
    kept = letters.replace(found.stack, "").replace(found.contracted, "")
    ordered = found.stack + kept + found.contracted
    x = call(ATEN.permute.default, (x, [letters.index(letter) for letter in ordered]))
    if found.is_out_first:
        weight = call(ATEN.transpose.int, (weight, -2, -1))
    for _ in kept[1:] if found.stack else "":
        weight = call(ATEN.unsqueeze.default, (weight, 1))
    product = call(ATEN.matmul.default, (x, weight))
    node.target = ATEN.permute.default
    node.args = product, [(found.stack + kept + found.out).index(letter) for letter in found.result]


def _is_left(matmul: fx.Node, parameters: Mapping[str, str]) -> bool:
    """Return whether the left operand alone is a parameter, and a matrix."""
    left, right = cast(tuple[fx.Node, fx.Node], matmul.args)
    is_matrix = left.meta["val"].dim() == 2 and right.meta["val"].dim() > 1
    return is_matrix and left.name in parameters and right.name not in parameters


def _turn(node: fx.Node) -> None:
    weight, x = cast(tuple[fx.Node, fx.Node], node.args)
    turned = [node.graph.call_function(ATEN.transpose.int, (one, -2, -1)) for one in (x, weight)]
    product = node.graph.call_function(ATEN.matmul.default, tuple(turned))
    node.target, node.args = ATEN.transpose.int, (product, -2, -1)
