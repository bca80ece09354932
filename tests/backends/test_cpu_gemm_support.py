"""GEMM nodes that the CPU backend takes, and its reasons against the others."""

from typing import Literal

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.linear import linear_forward
from nmcompile.backends.shared import choose_kernel as choices
from nmcompile.config import CompileConfig, Phase
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import ChoiceSlot
from nmcompile.ir.node_meta import meta_of, nodes_of_kind
from nmcompile.layer_config import LayerConfig, Pruning
from nmcompile.pruning import NMPattern

pytestmark = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)


def gemm_backends(config: LayerConfig, layer: nn.Module) -> dict[Phase, str]:
    """Return the backend of each phase's GEMM."""
    compiled = nmcompile.compile(layer, "dense", config=CompileConfig(layers={"_default": config}, ends="sparse"))
    graphs = nmcompile.inspect(compiled).layers[0].graphs
    return {phase: meta_of(next(nodes_of_kind(graphs[phase].graph, "gemm"))).backend for phase in Phase}


def refusal_of(config: LayerConfig, layer: nn.Module, phase: Phase) -> str:
    compiled = nmcompile.compile(layer, "dense", config=CompileConfig(layers={"_default": config}, ends="sparse"))
    graph = nmcompile.inspect(compiled).layers[0].graphs[phase].graph
    (refusal,) = meta_of(next(nodes_of_kind(graph, "gemm"))).refusals
    assert refusal.backend == "cpu"
    return refusal.reason


def pruning(operator: str, pattern: str, group: Literal["auto", "batch", "flat"] = "auto") -> Pruning:
    return Pruning(operator, NMPattern.parse(pattern), group)


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "1:4"])
def test_patterns_that_keep_two_of_four(pattern: str) -> None:
    config = LayerConfig(weight=pruning("transposable", pattern), update_gradient=pruning("mvue", pattern))
    assert gemm_backends(config, nn.Linear(8, 8)) == dict.fromkeys(Phase, "cpu")
    assert gemm_backends(config, nn.Conv1d(8, 8, 3)) == dict.fromkeys(Phase, "cpu")


def test_a_row_wise_mask_is_sparse_forward_only() -> None:
    config = LayerConfig(weight=pruning("greedy", "2:4"))
    assert gemm_backends(config, nn.Linear(8, 8)) == {
        Phase.FORWARD: "cpu",
        Phase.BACKWARD: "reference",
        Phase.UPDATE: "reference",
    }


@pytest.mark.parametrize(
    ("config", "layer", "phase", "words"),
    [
        (LayerConfig(weight=pruning("greedy", "4:8")), nn.Linear(8, 8), Phase.FORWARD, "no sparse kernel for 4:8"),
        (LayerConfig(weight=pruning("greedy", "3:4")), nn.Linear(8, 8), Phase.FORWARD, "no sparse kernel for 3:4"),
        (LayerConfig(weight=pruning("greedy", "2:4")), nn.Conv3d(8, 8, 3), Phase.FORWARD, "conv3d"),
        (LayerConfig(weight=pruning("greedy", "2:4")), nn.Linear(8, 8), Phase.UPDATE, "is not pruned"),
        (LayerConfig(weight=pruning("greedy", "2:4")), nn.Linear(8, 8), Phase.BACKWARD, "is not pruned"),
        (LayerConfig(input=pruning("greedy", "2:4")), nn.Linear(8, 8), Phase.FORWARD, "is not pruned"),
    ],
)
def test_refusals_say_why(config: LayerConfig, layer: nn.Module, phase: Phase, words: str) -> None:
    assert words in refusal_of(config, layer, phase)


def test_the_mask_is_applied_by_the_gemm_itself() -> None:
    compiled = nmcompile.compile(nn.Linear(8, 8), config=CompileConfig(ends="sparse"))
    report = nmcompile.inspect(compiled).layers[0]
    names = [node.name for node in report.graphs[Phase.FORWARD].graph.nodes]
    assert "weight_pruned" not in names and "weight_mask" in names
    assert "# weight 2:4 transposable along in" in str(report.graphs)


@pytest.mark.parametrize("layers", [(), (nn.ReLU(),)], ids=["signed input", "4:8 ReLU input"])
def test_a_quantized_weight_is_read_from_its_grid(monkeypatch: pytest.MonkeyPatch, layers: tuple[nn.Module]) -> None:
    """Uses a single layer: after one, sums that differ by rounding may be pruned or quantized differently."""
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    model, x = nn.Sequential(*layers, nn.Linear(8, 8)), torch.randn(4, 8)
    config = CompileConfig(ends="sparse")
    sparse = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=[x], backend="cpu").eval()
    dense = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=[x], backend="reference").eval()
    torch.testing.assert_close(sparse(x), dense(x))
    assert "gemm: cpu" in nmcompile.inspect(sparse).layers[0].kernels[Phase.FORWARD]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_the_pruned_operand_stays(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    model, x = nn.Linear(16, 16), torch.randn(8, 16)
    with torch.no_grad():
        model.weight[3, 5] = value
    results = []
    for backend in ("cpu", "reference"):
        compiled = nmcompile.compile(model, config=CompileConfig(ends="sparse"), backend=backend)
        results.append(compiled(x).isfinite())
    assert torch.equal(*results) and not results[0][:, 3].any() and results[0][:, 4:].all()


def test_autocast_runs_the_sparse_kernels_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    model, x = nn.Linear(64, 32), torch.randn(16, 64)
    gradients = []
    for backend in ("cpu", "reference"):
        config = CompileConfig(ends="sparse", layers={"_default": LayerConfig(weight=pruning("transposable", "2:4"))})
        compiled = nmcompile.compile(model, "dense", config=config, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.float().square().sum(), [*compiled.parameters()]))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2**-6, atol=2**-4)


def test_bfloat16_runs_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_choice", lambda *_: Choice("sparse", "the test asks for it"))
    weight = (torch.ones(4, 8) * (torch.arange(8) % 4 < 2)).bfloat16()
    slot = ChoiceSlot("fc forward")
    assert linear_forward(torch.ones(1, 8).bfloat16(), weight, None, None, False, slot.name).eq(4).all()
    assert slot.latest is not None and slot.latest.kernel == "sparse"
