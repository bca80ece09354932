"""The reference backend's GEMMs against sums of products in float64, within the rounding that float32 may have."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

import nmcompile
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.config import Phase
from nmcompile.errors import LoweringError
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import conv_layer
from nmcompile.ir.node_meta import kind_of, meta_of
from nmcompile.ir.program import ThreeGraphs
from nmcompile.ir.protocols import Support
from tests.conformance.gemms import LAYERS, assert_within_rounding, lowered_graphs, operands, run, sums


@pytest.mark.parametrize("name", LAYERS)
def test_three_gemms_and_the_bias(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors = operands(layer, shape)
    assert_within_rounding(layer, run(lowered_graphs(layer), *tensors), tensors)


@pytest.mark.parametrize("name", LAYERS)
def test_operands_in_any_layout(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors = operands(layer, shape)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    assert_within_rounding(layer, run(lowered_graphs(layer), *strided), tensors)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_last_stays_channels_last(groups: int) -> None:
    layer = conv_layer("a", (8, 8 // groups, 3, 3), True, padding=1, groups=groups)
    tensors = operands(layer, (2, 8, 5, 6))
    x, weight, bias, grad_output = (t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)
    got = run(lowered_graphs(layer), x, weight, bias, grad_output)
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
    """Return the same tensor with its first two dims stored in the other order."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def assert_equals_eager(eager: nn.Module, x: Tensor, grad_output: Tensor | None = None) -> None:
    """Check output and every gradient, bit for bit."""
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
    for node in nodes(lowered_graphs(LAYERS["conv2d"][0])):
        support = backend.supports(node)
        assert support.ok and "no speed-up" in support.reason


def test_what_is_no_operation_of_the_ir_is_refused() -> None:
    node = next(node for node in nodes(lowered_graphs(LAYERS["linear"][0])) if kind_of(node) == "gemm")
    with pytest.raises(LoweringError, match="layer 'a': node 'gemm_forward' is not an operation of the IR"):
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
        layer = meta_of(node).layer
        ops.replace_node(node, lambda x, w: sums(layer, x, w, torch.zeros(layer.out_features)), node.args)


@pytest.mark.parametrize("name", [name for name, (layer, _) in LAYERS.items() if layer.has_bias])
def test_the_bias_of_a_gemm_that_another_backend_took(name: str) -> None:
    layer, shape = LAYERS[name]
    tensors = operands(layer, shape)
    graphs = lowered_graphs(layer, TakesForward())
    assert graphs.kernels()[Phase.FORWARD] == "gemm: forward, bias: reference"
    assert_within_rounding(layer, run(graphs, *tensors), tensors)
