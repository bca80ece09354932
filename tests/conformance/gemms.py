"""The three GEMMs of a layer by definition, in float64, and the rounding that float32 may have."""

from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.backends.reference import ReferenceBackend
from nmcompile.config import CompileConfig, preset
from nmcompile.ir.captured import Captured, Facts, Site
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer, conv_layer
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.ir.protocols import Backend
from nmcompile.layer_config import LayerConfig
from nmcompile.passes import compile_passes
from nmcompile.planning.plan_phases import plan_phases

UNIT = 2.0**-24
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (LinearLayer("a", (6, 5), True), (7, 5)),
    "linear, many dims": (LinearLayer("a", (6, 5), True), (2, 3, 4, 5)),
    "linear, no bias": (LinearLayer("a", (6, 5), False), (2, 3, 5)),
    "linear, transposed": (LinearLayer("a", (5, 6), True, transposed=True), (2, 3, 5)),
    "conv1d": (conv_layer("a", (6, 4, 3), True), (3, 4, 9)),
    "conv2d": (conv_layer("a", (6, 4, 3, 2), True), (3, 4, 7, 6)),
    "conv3d": (conv_layer("a", (6, 2, 2, 3, 2), True), (2, 2, 4, 5, 3)),
    "conv2d, no bias": (conv_layer("a", (6, 4, 3, 3), False), (3, 4, 6, 6)),
    "1x1": (conv_layer("a", (6, 4, 1, 1), True), (3, 4, 5, 5)),
    "1x1, stride": (conv_layer("a", (6, 4, 1, 1), True, stride=2), (3, 4, 5, 6)),
    "stride and padding": (conv_layer("a", (6, 4, 3, 3), True, stride=(2, 3), padding=(1, 2)), (3, 4, 8, 7)),
    "dilation": (conv_layer("a", (6, 4, 3, 2), True, dilation=(2, 3), padding=1), (3, 4, 8, 7)),
    "groups": (conv_layer("a", (6, 2, 3), True, groups=3, stride=2), (3, 6, 9)),
    "depthwise": (conv_layer("a", (8, 1, 3, 3), True, groups=4, padding=1), (3, 4, 5, 5)),
    "groups, 3d": (conv_layer("a", (4, 2, 2, 2, 2), False, groups=2, dilation=2), (2, 4, 4, 4, 5)),
}
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Y, dX, dW and db."""


def lowered_graphs(layer: Layer, *backends: Backend, pruning: LayerConfig | None = None) -> ThreeGraphs:
    """Return the three graphs of a layer; the reference backend takes the nodes that `backends` do not take."""
    captured = Captured((Site(layer, "a", "", "a.weight"),), {"a": Facts()})
    program = Program(captured, plan_phases(captured, pruning or preset("dense"), CompileConfig(ends="sparse")))
    for one in compile_passes([*backends, ReferenceBackend()]):
        one.run(program)
    return program.layers["a"]


def run(
    graphs: ThreeGraphs, x: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Return Y, dX, dW, and db if there is one."""
    values = {"input": x, "weight": weight, "bias": bias, "grad_output": grad_output, "weight_mask": mask}
    results: list[Tensor] = []
    for _, module in graphs:
        names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
        results += module(*(values[name] for name in names))
    return results


def sums(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute Y by the definition: a sum over kernel positions of products over channels."""
    if isinstance(layer, LinearLayer):
        return torch.einsum("...i,io->...o" if layer.transposed else "...i,oi->...o", x, weight) + bias
    assert isinstance(layer, ConvLayer)
    x = F.pad(x, [n for p in reversed(layer.padding) for n in (p, p)]).unflatten(1, (layer.groups, -1))
    kernel, dims = layer.weight_shape[2:], range(layer.spatial_dims)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
    sizes = [(x.shape[d + 3] - reach[d] - 1) // layer.stride[d] + 1 for d in dims]
    y = bias.view(1, -1, *(1 for _ in dims))
    for place in product(*map(range, kernel)):
        starts = [layer.dilation[d] * place[d] for d in dims]
        window, tap = x, weight.unflatten(0, (layer.groups, -1))
        for d in dims:
            window = window.narrow(d + 3, starts[d], layer.stride[d] * (sizes[d] - 1) + 1)
            window = window[(slice(None),) * (d + 3) + (slice(None, None, layer.stride[d]),)]
            tap = tap.select(3, place[d])
        y = y + torch.einsum("ngi...,goi->ngo...", window, tap).flatten(1, 2)
    return y


def expected(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor, pruned: Tensor | None = None
) -> Gradients:
    """Return the gradients of `sums`; dW for the pruned dY if there is one."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = sums(layer, *leaves)
    dx, dw, db = torch.autograd.grad(y, leaves, grad_output.double(), retain_graph=pruned is not None)
    if pruned is not None:
        dw = torch.autograd.grad(y, leaves[1], pruned.double())[0]
    return y.detach(), dx, dw, db


def operands(layer: Layer, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return X, W, b (zero if the layer has none) and dY."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(layer.weight_shape)
    bias = torch.randn(layer.out_features) * layer.has_bias
    return x, weight, bias, torch.randn_like(sums(layer, x, weight, bias))


def assert_within_rounding(layer: Layer, got: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
    """Check |error| <= n u / (1 - n u) × the sum of the magnitudes, for sums of n float32 products in any order.

    A result in bfloat16 is rounded once more.
    """
    exact, magnitudes = expected(layer, *tensors), expected(layer, *(tensor.abs() for tensor in tensors))
    taps = prod(layer.weight_shape) // (layer.in_features * layer.out_features)
    positions = exact[0].numel() // layer.out_features
    terms = layer.in_features * taps + 1, layer.out_features // layer.groups * taps, positions, positions
    dtype = tensors[0].dtype
    assert len(got) == 3 + layer.has_bias
    for mine, value, magnitude, n in zip(got, exact, magnitudes, terms, strict=False):
        n += 1  # the rounding of the product itself
        assert mine.dtype == dtype and mine.shape == value.shape
        of_sum = n * UNIT / (1 - n * UNIT) * magnitude
        of_result = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * (value.abs() + of_sum)
        assert bool(((mine.double() - value).abs() <= of_sum + of_result).all())
