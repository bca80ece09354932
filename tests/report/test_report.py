"""The report: text, JSON and markdown, its totals against closed forms, and a reason for every dense GEMM."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Phase, Pruning, presets
from nmcompile.errors import ConfigError
from nmcompile.ir.node_meta import find_meta
from nmcompile.report.report import Report

BATCH, SIZE = 2, 6
POSITIONS = {"0": BATCH * 4 * 4, "2": BATCH * 2 * 2, "5": BATCH, "7": BATCH}
"""Output positions: pixels after 3x3 kernels without padding, then samples."""
WEIGHTS = {"0": 8 * 4 * 9, "2": 8 * 8 * 9, "5": 16 * 32, "7": 4 * 16}
MACS = {name: POSITIONS[name] * WEIGHTS[name] for name in POSITIONS}
MIDDLE = ("2", "5")
"""Layers that the defaults prune: neither the first layer nor the last linear."""


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, 4, SIZE, SIZE)


def report_of(mode: str, x: Tensor, config: CompileConfig | None = None) -> Report:
    return nmcompile.analyze(network(), mode, args=(x,), config=config)


DENSITY: dict[str, tuple[float, float, float]] = {
    "dense": (1, 1, 1),
    "weights": (0.5, 1, 1),
    "t-weights": (0.5, 0.5, 1),
    "activations": (0.5, 1, 1),
    "gradients": (1, 1, 0.5),
    "training": (0.5, 0.5, 0.5),
}
"""Share of MACs that is left in forward, backward and update, as Table 1 places the pruning."""


@pytest.mark.parametrize("mode", DENSITY)
def test_totals_equal_closed_forms(mode: str, x: Tensor) -> None:
    summary = report_of(mode, x).summary
    total = sum(MACS.values())
    pruned = sum(MACS[name] for name in MIDDLE)
    for phase, density in zip(Phase, DENSITY[mode], strict=True):
        values = summary["phases"][phase.value]
        assert values["macs"] == total
        assert values["expected_macs"] == pytest.approx(total - pruned * (1 - density))
        assert values["sparse_share"] == pytest.approx(pruned / total if density < 1 else 0)
        assert values["bops"] == pytest.approx(values["expected_macs"] * 32 * 32)
    assert (summary["layers"], summary["uncounted_layers"]) == (4, 0)
    assert summary["sparse_layers"] == (0 if mode == "dense" else 2)
    assert summary["pruned_share"] == pytest.approx(pruned / total * sum(one < 1 for one in DENSITY[mode]) / len(Phase))
    assert summary["parameters"] == sum(WEIGHTS.values())
    assert summary["sparse_parameters"] == (0 if mode == "dense" else sum(WEIGHTS[name] for name in MIDDLE))


def test_two_sparse_operands_meet_as_equation_26_says(x: Tensor) -> None:
    """Of four products of a block of 2:4 weights and a block of 2:4 activations one is left on average."""
    both = LayerConfig(weight=Pruning("greedy", NMPattern(2, 4)), input=Pruning("greedy", NMPattern(2, 4)))
    config = CompileConfig(layers={"re:.*": None, "5": both})
    values = report_of("dense", x, config).summary["phases"]["forward"]
    assert values["expected_macs"] == pytest.approx(sum(MACS.values()) - MACS["5"] * 3 / 4)


@pytest.mark.parametrize("source", ["export", "run"])
def test_macs_come_from_an_export_or_from_a_run(source: str, x: Tensor) -> None:
    if source == "export":
        report = report_of("training", x)
    else:
        model = nmcompile.compile(network(), config=CompileConfig(ends="sparse"))
        model(x)
        report = nmcompile.inspect(model)
    assert {layer.name: layer.macs for layer in report.layers} == MACS


def test_unknown_shapes_are_said_to_be_unknown() -> None:
    report = nmcompile.analyze(network())
    assert [layer.macs for layer in report.layers] == [None] * 4
    assert report.summary["phases"]["forward"]["macs"] is None
    assert report.summary["uncounted_layers"] == 4 and report.pruned_share is None
    assert "MACs of 4 layers are unknown and not counted: no example showed their shapes (args=" in str(report)


@pytest.mark.parametrize("mode", presets)
def test_every_dense_phase_of_a_pruning_mode_has_a_reason(mode: str, x: Tensor) -> None:
    for layer in report_of(mode, x).layers:
        assert {row.phase for row in layer.plan.rows} == set(Phase)
        assert all((row.operand is not None) != bool(row.reason) for row in layer.plan.rows)


def test_reasons_are_printed(x: Tensor) -> None:
    text = str(report_of("training", x))
    assert "first layer, not pruned" in text and "last linear, not pruned" in text


def test_a_layer_that_was_not_called_is_not_counted_as_sparse(x: Tensor) -> None:
    model = nmcompile.compile(network(), args=(x,))
    assert {layer.status for layer in nmcompile.inspect(model).layers} == {"dense", "not called yet"}
    for name in "0", "1", "2":
        x = model.get_submodule(name)(x)
    assert nmcompile.inspect(model).layer("2").status == "sparse"
    assert nmcompile.inspect(model).layer("5").status.startswith("bypassed")
    summary = nmcompile.inspect(model).summary
    assert summary["sparse_layers"] == 1
    assert summary["phases"]["forward"]["expected_macs"] == sum(MACS.values()) - MACS["2"] / 2


def test_text_and_markdown_name_every_layer_and_the_totals(x: Tensor) -> None:
    report = report_of("training", x)
    for text in (str(report), report.full(), report.to_markdown()):
        assert "Sequential, mode 'training': 2 of 4 layers sparse" in text
        assert "8×8×3×3" in text and "W 2:4 transposable" in text and "dY 2:4 mvue" in text
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == list(MACS)
    assert len({line.count("|") for line in table}) == 1


def test_json_is_versioned_and_complete(x: Tensor) -> None:
    data: dict[str, Any] = json.loads(report_of("training", x).to_json())
    assert data["schema_version"] == 1
    assert (data["model"], data["mode"]) == ("Sequential", "training")
    assert {layer["name"]: layer["macs"] for layer in data["layers"]} == MACS
    assert data["summary"] == report_of("training", x).summary
    rows = {row["phase"]: row for layer in data["layers"] if layer["name"] == "2" for row in layer["rows"]}
    assert [(row["operand"], row["operator"], row["pattern"], row["axis"]) for row in rows.values()] == [
        ("weight", "transposable", "2:4", "in"),
        ("weight", "transposable", "2:4", "out"),
        ("grad_output", "mvue", "2:4", "auto"),
    ]
    assert all(row["reason"] for layer in data["layers"] if layer["name"] == "0" for row in layer["rows"])


def test_kernels_name_who_runs_each_phase(x: Tensor) -> None:
    model = nmcompile.compile(network(), backend="reference")
    model(x)
    kernels = nmcompile.inspect(model).layer("5").kernels
    assert set(kernels) == set(Phase)
    assert all("gemm: reference" in text for text in kernels.values())


@pytest.mark.parametrize("mode", presets)
def test_graphs_are_printed_one_node_a_line(mode: str, x: Tensor) -> None:
    graphs = report_of(mode, x).layer("5").graphs
    lines = str(graphs).splitlines()
    assert [line.split("(")[0] for line in lines if not line.startswith(" ")] == [phase.value for phase in Phase]
    calls = [node for phase in Phase for node in graphs[phase].graph.nodes if node.op == "call_function"]
    assert [line.split()[0] for line in lines if line.startswith(" ")] == [node.name for node in calls]


def test_whole_graph_holds_the_nodes_of_every_rewritten_layer(x: Tensor) -> None:
    graph = report_of("training", x).graph
    assert isinstance(graph, fx.Graph)
    graph.lint()
    # Each weight is pruned by its own node or by its GEMM.
    pruned = [meta for meta in map(find_meta, graph.nodes) if meta is not None and (meta.kind == "prune" or meta.fused)]
    assert len(pruned) == len(MIDDLE)
    assert {meta.layer.name for meta in map(find_meta, graph.nodes) if meta is not None} == set(MIDDLE)


@pytest.mark.parametrize("style", [str, Report.to_markdown])
def test_what_is_no_gemm_is_listed_with_its_reason(style: Callable[[Report], str]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ConvTranspose1d(8, 8, 3, groups=2))
    assert "skipped: 1: grouped transposed convolution" in style(nmcompile.analyze(model))


def test_why_there_is_no_whole_graph() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.layers(x) if x.sum() > 0 else self.layers(-x)
            return scores

    report = nmcompile.analyze(Branching())
    assert report.graph is None
    assert report.graph_reason and report.graph_reason in report.full()
    assert report.summary["layers"] == 4


def test_inspect_sees_through_a_wrapper(x: Tensor) -> None:
    model = nmcompile.compile(network())
    wrapped = nn.DataParallel(model)
    model(x)
    assert nmcompile.inspect(wrapped).to_json() == nmcompile.inspect(model).to_json()


def test_unknown_layer_is_an_error_with_the_nearest_name(x: Tensor) -> None:
    with pytest.raises(ConfigError, match="known names: 0, 2, 5, 7"):
        report_of("training", x).layer("head")
