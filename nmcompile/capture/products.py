"""Products with a parameter: rewritten as linear layers where they are such, else named with the reason why not.

x @ W.T, torch.inner(x, W), einsum("...i,oi->...o", x, W)  ->  F.linear(x, W)
x @ W, torch.mm(x, W), einsum("...i,io->...o", x, W)       ->  linear_in_out(x, W)
torch.addmm(b, x, W.t())                                   ->  F.linear(x, W, b)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument

from nmcompile.capture.names import operator_name
from nmcompile.ir.calls import ADDMM_NAMES, LABEL, linear_in_out, match_call
from nmcompile.ir.einsum import linear_einsum

LAYOUT = {
    "t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "movedim", "expand", "expand_as", "unsqueeze",
    "squeeze", "view", "reshape", "flatten", "unflatten", "contiguous", "clone", "to", "type_as", "float", "half",
    "bfloat16", "repeat", "getitem", "select", "index_select", "narrow", "numpy_T",
}  # fmt: skip
"""Operators whose result holds only elements of their first argument."""
TRANSPOSITIONS = {"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute", "numpy_T"}
MATMUL_NAMES = {"input": "input", "self": "input", "other": "weight", "mat2": "weight", "tensor2": "weight"}
ELEMENTWISE = {"add", "sub", "mul", "div", "truediv", "where"}
CANDIDATES = {"matmul", "imatmul", "linalg_matmul", "mm", "inner", "einsum", "addmm"}
"""Products that may be a linear layer."""
OTHERS = {
    "bmm", "baddbmm", "addbmm", "bilinear", "tensordot", "mv", "addmv", "chain_matmul", "multi_dot",
    "linalg_multi_dot", "multi_head_attention_forward",
    "scaled_dot_product_attention", "grouped_mm", "_grouped_mm",
}  # fmt: skip
"""Products that cannot be a linear layer."""
ADDING = ("addmm", "baddbmm", "addbmm", "addmv")
"""Products that add their first argument."""


@dataclass(frozen=True)
class Refused:
    """A product with a parameter that is not a linear layer: its node, the operand with the parameter, and the reason.

    `label` names the product in the words of the model's code.
    """

    node: fx.Node
    operand: fx.Node
    label: str
    reason: str


def rewrite_products(
    graph: fx.Graph, is_input: Callable[[fx.Node], bool], weight_dims: Callable[[fx.Node], int | None]
) -> list[Refused]:
    """Rewrite in place the products with a parameter that are linear layers, and return the others.

    Args:
        graph: the graph of a module or of the whole model.
        is_input: whether a node without inputs is an activation.
        weight_dims: the number of dims of a node's value; None if no parameter is in it.
    """
    finder = _Finder(_varying(graph, is_input), weight_dims)
    return [refused for node in list(graph.nodes) for refused in finder.visit(node)]


def _varying(graph: fx.Graph, is_input: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Return the nodes that depend on an activation."""
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if is_input(node) or any(source in varying for source in node.all_input_nodes):
            varying.add(node)
    return varying


@dataclass(frozen=True)
class _Finder:
    varying: set[fx.Node]
    weight_dims: Callable[[fx.Node], int | None]

    def visit(self, node: fx.Node) -> Iterator[Refused]:
        """Rewrite a node that is a linear layer; yield it if it reads a parameter but is not one."""
        name = _plain_name(node)
        if node not in self.varying:
            return
        if name == "addmm" and node.op == "call_method":
            node.op, node.target = "call_function", torch.addmm
        if name != "addmm" and (call := match_call(node)) is not None:
            if call.weight in self.varying:
                within = self._within(call.weight, LAYOUT | ELEMENTWISE)
                yield from (Refused(node, one, call.label, "its weight depends on the input") for one in within)
        elif name in CANDIDATES | OTHERS:
            weights = [weight for operand in _factors(name, node) for weight in self._within(operand, LAYOUT)]
            label = _label(name, node)
            reason = self._rewrite(name, node, weights) if weights else ""
            yield from (Refused(node, weight, label, reason) for weight in weights if reason)

    def _within(self, operand: Argument, through: set[str]) -> list[fx.Node]:
        """Return the matrices that an operand consists of, each computed from parameters alone."""
        if not isinstance(operand, fx.Node):
            return []
        if operand not in self.varying:
            return [operand] if (self.weight_dims(operand) or 0) > 1 else []
        name = _plain_name(operand)
        if name not in through:
            return []
        sources = operand.args[:1] if name in LAYOUT else operand.args
        return [weight for source in sources for weight in self._within(source, through)]

    def _rewrite(self, name: str, node: fx.Node, weights: list[fx.Node]) -> str:
        """Rewrite a product as a linear layer and return ""; else return why it is not one."""
        product = _einsum(node, weights) if name == "einsum" else _matmul(name, node) if name in CANDIDATES else None
        if product is None:
            return "it is not a linear layer"
        if not isinstance(product.weight, fx.Node) or product.weight not in weights:
            return "its weight is the left operand, or is not one matrix for all inputs"
        if (dims := self.weight_dims(product.weight)) != 2:
            return f"its weight has {dims} dims"
        source = None if product.is_out_in else _transposed(product.weight)
        weight, is_out_in = (product.weight, product.is_out_in) if source is None else (source, True)
        if name != "addmm":
            _retarget(node, F.linear if is_out_in else linear_in_out, (product.input, weight), _label(name, node))
        elif is_out_in and self._adds_bias(node, product.bias):
            _retarget(node, F.linear, (product.input, weight, product.bias), _label(name, node))
        return ""

    def _adds_bias(self, addmm: fx.Node, bias: Argument) -> bool:
        """Return whether an addmm adds a vector and scales nothing."""
        call = match_call(addmm)
        is_vector = isinstance(bias, fx.Node) and bias not in self.varying and self.weight_dims(bias) == 1
        return call is not None and not call.refusal() and is_vector


def _factors(name: str, node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a product multiplies, without its addend."""
    added = {"scaled_dot_product_attention": ("attn_mask", 3)} | dict.fromkeys(ADDING, ("input", 0))
    key, position = added.get(name, ("", len(node.args)))
    operands = [*node.args[:position], *node.args[position + 1 :]]
    operands += [value for given, value in node.kwargs.items() if given not in (key, "self")]
    factors: list[fx.Node] = []
    fx.node.map_arg(operands, factors.append)
    return list(dict.fromkeys(factors))


@dataclass(frozen=True)
class _Product:
    """The factors of a product; `is_out_in` if the weight's first dim is the layer's output."""

    input: Argument
    weight: Argument
    is_out_in: bool = False
    bias: Argument = None


def _matmul(name: str, node: fx.Node) -> _Product | None:
    names = ("bias", "input", "weight") if name == "addmm" else ("input", "weight")
    given = dict(zip(names, node.args, strict=False))
    aliases = ADDMM_NAMES if name == "addmm" else MATMUL_NAMES
    given |= {aliases[key]: value for key, value in node.kwargs.items() if key in aliases}
    if not {"input", "weight"} <= given.keys():
        return None
    return _Product(given["input"], given["weight"], name == "inner", given.get("bias"))


def _einsum(node: fx.Node, weights: list[fx.Node]) -> _Product | None:
    equation, *operands = node.args or ("",)
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    weight = 1 if operands[1] in weights else 0
    is_out_in = linear_einsum(equation, weight)
    return None if is_out_in is None else _Product(operands[1 - weight], operands[weight], is_out_in)


def _transposed(node: fx.Node) -> fx.Node | None:
    """Return the matrix of which a node is the transpose; None if it is not a transpose."""
    name = _plain_name(node)
    source = node.args[0] if node.args else None
    if name not in TRANSPOSITIONS or not isinstance(source, fx.Node):
        return None
    given: list[Argument] = [*node.args[1:], *node.kwargs.values()]
    dims = [dim for one in given for dim in (one if isinstance(one, tuple | list) else [one])]
    if name in ("t", "T", "mT", "numpy_T"):
        return source
    axes = [dim % 2 if isinstance(dim, int) else None for dim in dims]
    return source if axes == [1, 0] or (name != "permute" and axes == [0, 1]) else None


def _plain_name(node: fx.Node) -> str:
    """Return the name of the function, the method, or the attribute that is read."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(node.args[1]) if node.target is getattr else operator_name(node)


def _label(name: str, node: fx.Node) -> str:
    return f"einsum {node.args[0]!r}" if name == "einsum" and node.args else name


def _retarget(node: fx.Node, function: Callable[..., object], args: tuple[Argument, ...], label: str) -> None:
    before = node.all_input_nodes
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}
    node.meta[LABEL] = label
    for source in before:
        if not source.users and source.op in ("call_function", "call_method"):
            source.graph.erase_node(source)
