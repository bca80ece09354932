"""Every backend's three GEMMs on pruned operands against sums of products in float64."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmcompile.api.choose_backends import ACCELERATED
from nmcompile.ir import operations as ops
from nmcompile.ir.layers import ConvLayer, Layer, LinearLayer, conv_layer
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.native import INSTRUCTION_SETS
from nmcompile.pruning import NMPattern
from tests.conformance.cases import CASES, Case, parameters
from tests.conformance.gemms import assert_within_rounding, lowered_graphs, operands, run

LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "linear": (LinearLayer("a", (12, 8), True), (7, 8)),
    "linear, one token": (LinearLayer("a", (12, 8), True), (1, 8)),
    "linear, many dims": (LinearLayer("a", (20, 68), False), (2, 3, 5, 68)),
    "linear, transposed": (LinearLayer("a", (8, 12), True, transposed=True), (4, 5, 8)),
    "linear, large": (LinearLayer("a", (1100, 132), True), (301, 132)),
    "conv1d": (conv_layer("a", (8, 4, 3), True, padding=1), (4, 4, 37)),
    "conv2d": (conv_layer("a", (8, 12, 3, 2), True), (3, 12, 9, 21)),
    "conv2d, padded": (conv_layer("a", (20, 8, 5, 3), False, padding=(2, 1)), (4, 8, 6, 17)),
    "conv2d, strides": (conv_layer("a", (8, 8, 3, 3), True, stride=(2, 3), padding=(1, 2)), (4, 8, 11, 10)),
    "conv2d, dilated strides": (conv_layer("a", (8, 4, 3, 3), True, stride=2, dilation=(2, 3)), (4, 4, 13, 14)),
    "1x1": (conv_layer("a", (36, 20, 1, 1), True), (8, 20, 5, 5)),
    "1x1, stride": (conv_layer("a", (8, 4, 1, 1), True, stride=2), (4, 4, 5, 6)),
    "groups": (conv_layer("a", (16, 4, 3, 3), True, groups=2, padding=1), (4, 8, 7, 7)),
    "conv2d, large": (conv_layer("a", (68, 36, 3, 3), True, padding=1), (4, 36, 19, 23)),
}
Operands = tuple[Tensor, Tensor, Tensor, Tensor]
PATTERNS = "2:4", "1:2", "1:4"


@pytest.fixture(params=parameters())
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return a backend whose sparse kernels run even if they gain nothing."""
    found: Case = request.param
    return found.prepare(monkeypatch)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Case:
    return CASES["cpu"].prepare(monkeypatch)


def pruned(layer: Layer, pattern: str) -> LayerConfig:
    # Greedy pruning of dY needs no key. The mask is the test's own; the operator only says that it is transposable.
    return LayerConfig(
        Pruning("transposable", NMPattern.parse(pattern)), update_gradient=Pruning("greedy", NMPattern.parse(pattern))
    )


def both_ways(layer: Layer, pattern: NMPattern) -> Tensor:
    """Return a mask that is N:M along in- and along out-features: the same diagonals in every tile."""
    out, inner = (torch.arange(layer.weight_shape[dim]) for dim in (layer.out_dim, layer.in_dim))
    mask = (out[:, None] + inner) % pattern.block < pattern.n_keep
    if layer.out_dim:
        mask = mask.t()
    return mask.view(*mask.shape, *(1,) * (len(layer.weight_shape) - 2)).expand(layer.weight_shape).contiguous()


def check(layer: Layer, case: Case, pattern: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Run the layer's graphs, compare, and return their results."""
    parsed = NMPattern.parse(pattern)
    graphs = lowered_graphs(layer, case.backend, pruning=pruned(layer, pattern))
    x, weight, bias, grad_output = given = [tensor.to(case.dtype) for tensor in tensors]
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(both_ways(layer, parsed))
    kept = ops.prune(grad_output, "greedy", parsed.n_keep, parsed.block, "auto", layer.channel_dim)
    got = run(graphs, *(tensor.to(case.device) for tensor in (*given, mask)))
    assert_within_rounding(layer, [y.cpu() for y in got], (x, weight * mask, bias, grad_output, kept))
    case.check_kernels(layer, graphs)
    return got


def test_every_backend_has_a_case() -> None:
    assert {case.backend.name for case in CASES.values()} == {"reference", *(one.name for one in ACCELERATED)}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", LAYERS)
def test_three_gemms(name: str, pattern: str, case: Case) -> None:
    layer, shape = LAYERS[name]
    check(layer, case, pattern, operands(layer, shape))


@pytest.mark.parametrize("name", LAYERS)
def test_operands_in_any_layout(name: str, case: Case) -> None:
    layer, shape = LAYERS[name]
    x, weight, bias, grad_output = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in operands(layer, shape))
    check(layer, case, "2:4", (x, weight, bias, grad_output))


@pytest.mark.parametrize("name", [name for name, (layer, _) in LAYERS.items() if len(layer.weight_shape) == 4])
@pytest.mark.parametrize("which", ["all", "input", "weight"])
def test_channels_last(name: str, which: str, case: Case) -> None:
    layer, shape = LAYERS[name]
    x, weight, bias, grad_output = operands(layer, shape)
    if which != "weight":
        x, grad_output = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_output))
    if which != "input":
        weight = weight.contiguous(memory_format=torch.channels_last)
    got = check(layer, case, "2:4", (x, weight, bias, grad_output))
    assert isinstance(layer, ConvLayer)
    eager = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert got[0].stride() == eager.stride()


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8])
def test_blocks_across_samples_or_along_positions(samples: int, case: Case) -> None:
    layer = conv_layer("a", (8, 8, 3, 3), True, padding=1)
    check(layer, case, "2:4", operands(layer, (samples, 8, 5, 7)))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_instruction_set(name: str, isa: str, cpu: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    layer, shape = LAYERS[name]
    check(layer, cpu, "2:4", operands(layer, shape))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name: str, isa: str, cpu: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    layer, shape = LAYERS[name]
    check(layer, replace(cpu, dtype=torch.bfloat16), "2:4", operands(layer, shape))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_pair_of_places(isa: str, cpu: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmcompile.native.INSTRUCTION_SETS", (isa,))
    layer = LinearLayer("a", (16, 4), False)
    weight = torch.tensor([[float(place + 1) * (kept >> place & 1) for place in range(4)] for kept in range(16)])
    few = (weight != 0).sum(1) <= 2
    x = torch.tensor([[1.0, 16.0, 256.0, 4096.0]])
    graphs = lowered_graphs(layer, cpu.backend, pruning=LayerConfig(weight=Pruning("greedy", NMPattern(2, 4))))
    for dtype in (torch.float32, torch.bfloat16):
        bias, grad_output = torch.zeros(16, dtype=dtype), torch.zeros(1, 16, dtype=dtype)
        got = run(graphs, x.to(dtype), (weight * few[:, None]).to(dtype), bias, grad_output, (weight != 0))
        expected = (x.double() @ (weight * few[:, None]).double().t()).to(dtype)
        assert torch.equal(got[0], expected)


@pytest.mark.parametrize("name", ["linear, large", "conv2d, large", "conv2d, strides"])
def test_results_do_not_depend_on_the_number_of_threads(name: str, cpu: Case) -> None:
    layer, shape = LAYERS[name]
    tensors, threads = operands(layer, shape), torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(check(layer, cpu, "2:4", tensors))
    torch.set_num_threads(threads)
    # PyTorch sums db.
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0][:3], other[:3], strict=True))
