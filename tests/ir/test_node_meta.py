"""Every call node carries one record, in one place, that nothing changes in place."""

from dataclasses import FrozenInstanceError

import pytest
from torch import fx, nn

import nmcompile
from nmcompile.backends.cpu import CpuBackend
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.config import Phase, presets
from nmcompile.ir.node_meta import KEY, find_meta, kind_of, meta_of, nodes_of_kind, row_of, update_meta
from nmcompile.ir.plan import PlanRow
from nmcompile.ir.program import ThreeGraphs
from nmcompile.layer_config import WEIGHT_OPERATORS, Pruning
from nmcompile.pruning import NMPattern
from nmcompile.training.masks import WeightMask
from tests.conformance.gemms import LAYERS, lowered_graphs

BACKENDS = [CpuBackend()] if kernel_support().ok else []


def graphs_of(mode: str, layer: str) -> ThreeGraphs:
    return lowered_graphs(LAYERS[layer][0], *BACKENDS, pruning=presets[mode])


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("mode", presets)
def test_call_nodes_carry_the_record_and_nothing_else(mode: str, layer: str) -> None:
    graphs = graphs_of(mode, layer)
    for phase, module in graphs:
        for node in module.graph.nodes:
            assert set(node.meta) == ({KEY} if node.op == "call_function" else set())
        assert {(meta.layer, meta.phase) for meta in graphs.metas(phase)} == {(graphs.layer, phase)}


def test_placeholders_have_no_record() -> None:
    node = fx.Graph().placeholder("input")
    assert [find_meta(node), kind_of(node), row_of(node)] == [None, None, None]


def test_a_copy_of_a_graph_is_updated_by_itself() -> None:
    module = graphs_of("training", "linear")[Phase.FORWARD]
    copied = fx.Graph()
    copied.graph_copy(module.graph, {})
    (gemm,), (copied_gemm,) = nodes_of_kind(module.graph, "gemm"), nodes_of_kind(copied, "gemm")
    assert meta_of(copied_gemm) is meta_of(gemm)
    update_meta(copied_gemm, backend="another")
    assert meta_of(copied_gemm).backend == "another" != meta_of(gemm).backend


def test_a_record_is_not_changed_in_place() -> None:
    (gemm,) = nodes_of_kind(graphs_of("training", "linear")[Phase.FORWARD].graph, "gemm")
    with pytest.raises(FrozenInstanceError):
        meta_of(gemm).backend = "another"  # type: ignore[misc]
    with pytest.raises(TypeError, match="backennd"):
        update_meta(gemm, backennd="another")


@pytest.mark.parametrize("operator", sorted(WEIGHT_OPERATORS))
def test_the_plan_the_config_and_the_mask_agree_on_what_is_transposable(operator: str) -> None:
    pruning = Pruning(operator, NMPattern(2, 4))
    row = PlanRow("a", Phase.FORWARD, "weight", operator, pruning.pattern, "in")
    asked = nmcompile.CompileConfig(layers={"_default": nmcompile.LayerConfig(weight=pruning)}, ends="sparse")
    compiled = nmcompile.compile(nn.Linear(8, 8), "dense", config=asked)
    assert isinstance(compiled, nmcompile.ThreeGemm)
    mask = compiled.three_gemms[""].mask
    assert isinstance(mask, WeightMask)
    assert row.is_transposable == pruning.is_transposable == mask.is_transposable == (operator != "greedy")
    assert not PlanRow("a", Phase.FORWARD).is_transposable
