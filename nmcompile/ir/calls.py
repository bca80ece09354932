"""Recognition of fx nodes that are conv or linear calls, and the geometry in their arguments."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import Argument

from nmcompile.ir.layers import Layer, LinearLayer, conv_layer

aten = torch.ops.aten
LINEAR = ("input", "weight", "bias")
ADDMM = ("bias", "input", "weight")
PRODUCT = ("input", "weight")
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
ADDMM_NAMES = {"self": "bias", "input": "bias", "mat1": "input", "mat2": "weight"}
LABEL = "label"
"""Key of `node.meta`: the source form of a call that capture has rewritten."""


def linear_in_out(input: Tensor, weight: Tensor) -> Tensor:
    """Compute Y = X W, with the weight stored (in, out)."""
    return input @ weight


def _signatures() -> dict[object, tuple[str, ...]]:
    found: dict[object, tuple[str, ...]] = {F.linear: LINEAR, linear_in_out: PRODUCT, torch.addmm: ADDMM}
    found |= dict.fromkeys((aten.linear, aten.linear.default), LINEAR)
    found |= dict.fromkeys((aten.addmm, aten.addmm.default), ADDMM)
    found |= dict.fromkeys((aten.convolution, aten.convolution.default, torch.convolution), CONVOLUTION)
    for function, op in ((F.conv1d, aten.conv1d), (F.conv2d, aten.conv2d), (F.conv3d, aten.conv3d)):
        found |= dict.fromkeys((function, op, op.default, op.padding), CONV)
    return found


SIGNATURES = _signatures()


@dataclass(frozen=True)
class Call:
    """A conv or linear call: its node, its arguments by name, and whether the weight is stored (in, out)."""

    node: fx.Node
    arguments: dict[str, Argument]
    transposed: bool

    @property
    def input(self) -> Argument:
        return self.arguments.get("input")

    @property
    def weight(self) -> Argument:
        return self.arguments.get("weight")

    @property
    def label(self) -> str:
        """Return the call as its author would know it, `F.linear`, `torch.addmm` or `matmul`."""
        written = self.node.meta.get(LABEL)
        return str(written or (f"torch.{self.function}" if self.transposed else f"F.{self.function}"))

    @property
    def function(self) -> str:
        """Return the name of the called function."""
        return str(getattr(self.node.target, "__name__", self.node.target)).split(".")[0]

    def refusal(self) -> str:
        """Return why the call is not Y = X Wᵀ + b; "" if it is."""
        if self.transposed and any(self.arguments.get(name, 1) != 1 for name in ("alpha", "beta")):
            return "addmm scales its product or its bias"
        constant = (self.arguments.get(name) for name in ("stride", "padding", "dilation", "groups"))
        if any(has_node(value) for value in constant):
            return "its stride, padding, dilation or groups are computed"
        return ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the numbers of dims that the weight may have."""
        ranks = {"convolution": (3, 4, 5), "conv1d": (3,), "conv2d": (4,), "conv3d": (5,)}
        return ranks.get(self.function, (2,))

    def layer(self, name: str, weight_shape: tuple[int, ...]) -> Layer:
        """Return the layer that the call is, for a weight of this shape."""
        has_bias = self.arguments.get("bias") is not None
        if len(weight_shape) == 2:
            return LinearLayer(name, weight_shape, has_bias, self.transposed)
        given: dict[str, Any] = {key: self.arguments[key] for key in CONV[3:] if self.arguments.get(key) is not None}
        return conv_layer(name, weight_shape, has_bias, **given)


def match_call(node: fx.Node) -> Call | None:
    """Return the conv or linear call that a node is, or None."""
    if node.op != "call_function" or node.target not in SIGNATURES:
        return None
    names = SIGNATURES[node.target]
    given = {ADDMM_NAMES.get(key, key) if names is ADDMM else key: value for key, value in node.kwargs.items()}
    arguments = dict(zip(names, node.args, strict=False)) | given
    if arguments.get("transposed"):
        return None
    return Call(node, arguments, names in (ADDMM, PRODUCT))


def has_node(value: Argument) -> bool:
    """Return whether a node's argument holds another node."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(value, nodes.append)
    return bool(nodes)
