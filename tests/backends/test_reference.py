"""The reference backend's GEMMs beside sums of products in float64, within the rounding that float32 is entitled to."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nmcompile
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.config import CompileConfig, Phase, preset
from nmcompile.errors import LoweringError
from nmcompile.ir import operations as ops
from nmcompile.ir.captured import Captured, Facts, Site
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer, conv_layer
from nmcompile.ir.program import Program, ThreeGraphs
from nmcompile.ir.protocols import Backend, Support
from nmcompile.passes import compile_passes
from nmcompile.passes.plan_phases import plan_phases

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


def reference_graphs(layer: Layer, *backends: Backend) -> ThreeGraphs:
    captured = Captured((Site(layer, "a", "", "a.weight"),), {"a": Facts()})
    program = Program(captured, plan_phases(captured, preset("dense"), CompileConfig()))
    for one in compile_passes([*backends, ReferenceBackend()]):
        one.run(program)
    return program.layers["a"]


def run(graphs: ThreeGraphs, x: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor) -> list[Tensor]:
    """Y, dX, dW, and db if there is one."""
    values = {"input": x, "weight": weight, "bias": bias, "grad_output": grad_output}
    results: list[Tensor] = []
    for _, module in graphs:
        names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
        results += module(*(values[name] for name in names))
    return results


def sums(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Y by the definition: a sum over kernel positions of products over channels."""
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


def expected(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor) -> Gradients:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    y = sums(layer, *leaves)
    dx, dw, db = torch.autograd.grad(y, leaves, grad_output.double())
    return y.detach(), dx, dw, db


def operands(layer: Layer, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, W, b (zero where the layer has none) and dY."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(layer.weight_shape)
    bias = torch.randn(layer.out_features) * layer.has_bias
    return x, weight, bias, torch.randn_like(sums(layer, x, weight, bias))


def assert_within_rounding(layer: Layer, got: list[Tensor], tensors: tuple[Tensor, ...]) -> None:
    """|error| <= n u / (1 - n u) times the sum of the magnitudes, for sums of n float32 products in any order."""
    exact, magnitudes = expected(layer, *tensors), expected(layer, *(tensor.abs() for tensor in tensors))
    taps = prod(layer.weight_shape) // (layer.in_features * layer.out_features)
    positions = exact[0].numel() // layer.out_features
    terms = layer.in_features * taps + 1, layer.out_features // layer.groups * taps, positions, positions
    assert len(got) == 3 + layer.has_bias
    for mine, value, magnitude, n in zip(got, exact, magnitudes, terms, strict=False):
        n += 1  # the rounding of the product itself
        assert mine.dtype == torch.float32 and mine.shape == value.shape
        assert bool(((mine.double() - value).abs() <= n * UNIT / (1 - n * UNIT) * magnitude).all())


@pytest.mark.parametrize("name", LAYERS)
def test_three_gemms_and_the_bias(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors = operands(layer, shape)
    assert_within_rounding(layer, run(reference_graphs(layer), *tensors), tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_operands_in_any_layout(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors = operands(layer, shape)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    assert_within_rounding(layer, run(reference_graphs(layer), *strided), tensors)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_last_stays_channels_last(groups: int) -> None:
    layer = conv_layer("a", (8, 8 // groups, 3, 3), True, padding=1, groups=groups)
    tensors = operands(layer, (2, 8, 5, 6))
    x, weight, bias, grad_output = (t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)
    got = run(reference_graphs(layer), x, weight, bias, grad_output)
    assert_within_rounding(layer, got, tensors)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in got[:3])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(4, 6, 3, padding="same"),
        lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2),
        lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2),
        lambda: nn.Conv3d(4, 6, 2, padding=1),
        lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"),
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate", stride=2),
        lambda: nn.Conv3d(4, 6, 3, padding=(1, 0, 2), padding_mode="circular"),
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular", groups=2),
    ],
)
def test_padding_of_every_kind_equals_eager_bit_for_bit(make: Callable[[], nn.Conv2d]) -> None:
    conv = make()
    assert_equals_eager(conv, torch.randn(2, 4, *(6, 7, 5)[: len(conv.kernel_size)]))


@pytest.mark.parametrize("x_swapped", [False, True])
@pytest.mark.parametrize("dy_swapped", [False, True])
def test_linear_sums_in_the_order_of_eager(x_swapped: bool, dy_swapped: bool) -> None:
    """The order shows in the last bits of db, and depends on the layouts of X and dY."""
    x, grad_output = torch.randn(5, 200, 8), torch.randn(5, 200, 33)
    assert_equals_eager(nn.Linear(8, 33), swapped(x) if x_swapped else x, swapped(grad_output) if dy_swapped else None)


def swapped(x: Tensor) -> Tensor:
    """The same tensor, its first two dims stored in the other order."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def assert_equals_eager(eager: nn.Module, x: Tensor, grad_output: Tensor | None = None) -> None:
    """Output and every gradient, bit for bit."""
    results = []
    for module in (eager, nmcompile.compile(eager, "dense", backend="reference")):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        gradients = torch.autograd.grad(y, [leaf, *eager.parameters()], y if grad_output is None else grad_output)
        results.append([y, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def nodes(graphs: ThreeGraphs) -> list[fx.Node]:
    return [node for _, module in graphs for node in module.graph.nodes if node.op == "call_function"]


def test_it_takes_every_node_on_any_machine_and_says_that_nothing_is_gained() -> None:
    backend = ReferenceBackend()
    assert backend.available().ok and backend.available().reason
    for node in nodes(reference_graphs(LAYERS["conv2d"][0])):
        support = backend.supports(node)
        assert support.ok and "no speed-up" in support.reason


def test_what_is_no_operation_of_the_ir_is_refused() -> None:
    node = next(node for node in nodes(reference_graphs(LAYERS["linear"][0])) if node.meta["kind"] == "gemm")
    with pytest.raises(LoweringError, match="layer 'a': node 'gemm_forward' is no operation of the IR"):
        ReferenceBackend().lower(node)


@dataclass(frozen=True)
class TakesForward:
    """A backend with a forward GEMM that adds no bias."""

    name: str = "forward"

    def available(self) -> Support:
        return Support(True)

    def supports(self, node: fx.Node) -> Support:
        return Support(node.target is ops.gemm_forward, "only forward")

    def lower(self, node: fx.Node) -> None:
        layer = node.meta["layer"]
        ops.replace_node(node, lambda x, w: sums(layer, x, w, torch.zeros(layer.out_features)), node.args)


@pytest.mark.parametrize("name", [name for name, (layer, _) in LAYERS.items() if layer.has_bias])
def test_the_bias_of_a_gemm_that_another_backend_took(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors = operands(layer, shape)
    graphs = reference_graphs(layer, TakesForward())
    assert graphs.kernels()[Phase.FORWARD] == "gemm: forward, bias: reference"
    assert_within_rounding(layer, run(graphs, *tensors), tensors)
