"""Recognition of fx nodes that are conv or linear calls, and the geometry in their arguments."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import Argument

from nmcompile.ir.layers import Layer, LinearLayer, conv_layer, conv_transpose_layer

aten = torch.ops.aten
LINEAR = ("input", "weight", "bias")
ADDMM = ("bias", "input", "weight")
PRODUCT = ("input", "weight")
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
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
    found |= dict.fromkeys((F.conv_transpose1d, aten.conv_transpose1d, aten.conv_transpose1d.default), CONV_TRANSPOSE)
    found |= dict.fromkeys((F.conv_transpose2d, aten.conv_transpose2d, aten.conv_transpose2d.input), CONV_TRANSPOSE)
    found |= dict.fromkeys((F.conv_transpose3d, aten.conv_transpose3d, aten.conv_transpose3d.input), CONV_TRANSPOSE)
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
        names = ("stride", "padding", "output_padding", "dilation", "groups")
        constant = (self.arguments.get(name) for name in names)
        if any(has_node(value) for value in constant):
            return "its stride, padding, dilation or groups are computed"
        if self.is_conv_transpose and self.arguments.get("groups", 1) != 1:
            return "it is a transposed convolution of several groups"
        return ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the numbers of dims that the weight may have."""
        ranks = {"convolution": (3, 4, 5), "conv1d": (3,), "conv2d": (4,), "conv3d": (5,)}
        return ranks.get(self.function.replace("_transpose", ""), (2,))

    @property
    def is_conv_transpose(self) -> bool:
        """Return whether the call is a transposed convolution, whose weight is stored (in, out)."""
        return self.function.startswith("conv_transpose") or bool(self.arguments.get("transposed"))

    def layer(self, name: str, weight_shape: tuple[int, ...]) -> Layer:
        """Return the layer that the call is, for a weight of this shape."""
        has_bias = self.arguments.get("bias") is not None
        if len(weight_shape) == 2:
            return LinearLayer(name, weight_shape, has_bias, self.transposed)
        names = ("stride", "padding", "dilation", "output_padding" if self.is_conv_transpose else "groups")
        given: dict[str, Any] = {key: self.arguments[key] for key in names if self.arguments.get(key) is not None}
        make = conv_transpose_layer if self.is_conv_transpose else conv_layer
        return make(name, weight_shape, has_bias, **given)


def match_call(node: fx.Node) -> Call | None:
    """Return the conv or linear call that a node is, or None."""
    if node.op != "call_function" or node.target not in SIGNATURES:
        return None
    names = SIGNATURES[node.target]
    given = {ADDMM_NAMES.get(key, key) if names is ADDMM else key: value for key, value in node.kwargs.items()}
    arguments = dict(zip(names, node.args, strict=False)) | given
    return Call(node, arguments, names in (ADDMM, PRODUCT))


def has_node(value: Argument) -> bool:
    """Return whether a node's argument holds another node."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(value, nodes.append)
    return bool(nodes)
