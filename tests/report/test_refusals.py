"""The report says why no faster backend took a GEMM: per layer and phase, each reason once."""

import json
import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import fx, nn

import nmcompile
from nmcompile import CompileConfig, LayerConfig, NMPattern, Phase, Pruning, presets
from nmcompile.api.pipeline import lowered
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.reference import ReferenceBackend
from nmcompile.capture import capture_model
from nmcompile.ir.node_meta import Refusal, kind_of, meta_of
from nmcompile.ir.protocols import OTHER_KIND, Backend, Support
from nmcompile.planning.plan_phases import plan_phases
from nmcompile.report.refusals import layers_by_refusal
from nmcompile.report.report import Report, build_report

HEAD = "why no faster kernel"
needs_kernels = pytest.mark.skipif(not kernel_support().ok, reason=kernel_support().reason)


@dataclass(frozen=True)
class Picky:
    """A backend that takes the GEMMs of layers with a multiple of 16 out-features, and prunes nothing."""

    name: str = "picky"

    def available(self) -> Support:
        return Support(True)

    def supports(self, node: fx.Node) -> Support:
        if kind_of(node) != "gemm":
            return OTHER_KIND
        size = meta_of(node).layer.out_features
        return Support(size % 16 == 0, f"out-features {size} are not a multiple of 16")

    def lower(self, node: fx.Node) -> None:
        ReferenceBackend().lower(node)


def report_of(sizes: list[int], mode: str = "training", backend: str | Backend = Picky()) -> Report:
    """Return the report on a chain of linear layers, all sparse."""
    layers = [nn.Linear(first, second) for first, second in pairwise(sizes)]
    return nmcompile.analyze(nn.Sequential(*layers), mode, config=CompileConfig(ends="sparse"), backend=backend)


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the markdown table of refusals, without its head."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if HEAD in line), len(lines))
    rows = [line for line in lines[start:] if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_each_reason_stands_once_with_its_layers_and_phases() -> None:
    report = report_of([16, 16, 1000, 32, 1000, 40])
    why = "gemm: picky: out-features {} are not a multiple of 16"
    assert table_of(report.to_markdown()) == [[why.format(1000), *["1, 3"] * 3], [why.format(40), *["4"] * 3]]
    text = report.full()
    assert text.count("out-features 1000") == text.count("out-features 40") == 1


@pytest.mark.parametrize(("count", "cell"), [(50, "0, 1, 2 and 47 more"), (5, "0, 1, 2 and 2 more"), (4, "0, 1, 2, 3")])
def test_many_layers_take_one_line(count: int, cell: str) -> None:
    (row,) = table_of(report_of([8] * (count + 1)).to_markdown())
    assert row[1:] == [cell] * 3


def test_phases_that_the_plan_leaves_dense_have_its_reason_only() -> None:
    report = report_of([8, 8, 8], "weights")
    assert [row[1:] for row in table_of(report.to_markdown())] == [["0, 1", "–", "–"]]
    ends = nmcompile.analyze(nn.Sequential(nn.Conv1d(3, 8, 3), nn.Linear(8, 3)), backend=Picky())
    assert HEAD not in ends.full() and HEAD not in ends.to_markdown()


def test_nothing_is_said_where_the_first_backend_takes_all() -> None:
    for report in (report_of([16, 16, 32]), report_of([8, 8], backend="reference")):
        assert HEAD not in report.full() and HEAD not in report.to_markdown()


def test_json_has_every_refusal_of_a_layer() -> None:
    report = report_of([16, 16, 8], "weights")
    layers = json.loads(report.to_json())["layers"]
    assert layers[0]["refusals"] == {phase.value: [] for phase in Phase}
    refusal = {"kind": "gemm", "backend": "picky", "reason": "out-features 8 are not a multiple of 16"}
    assert layers[1]["refusals"] == {phase.value: [refusal] for phase in Phase}
    assert report.layer("1").refusals[Phase.UPDATE] == (Refusal(**refusal),)  # type: ignore[arg-type]


def test_reasons_cannot_break_out_of_their_cell() -> None:
    @dataclass(frozen=True)
    class Rude(Picky):
        def supports(self, node: fx.Node) -> Support:
            return Support(False, "no | cell\n# holds <b>this</b>")

    rows = table_of(report_of([8, 8], backend=Rude()).to_markdown())
    assert {tuple(row[1:]) for row in rows} >= {("0", "0", "0")} and {len(row) for row in rows} == {4}
    assert all("&lt;b&gt;this&lt;/b&gt;" in row[0] for row in rows)


def test_backends_with_the_same_reason_share_its_line() -> None:
    captured = capture_model(nn.Linear(8, 8))
    plan = plan_phases(captured, presets["weights"], CompileConfig(ends="sparse"))
    program = lowered(captured, plan, (Picky("first"), Picky("second"), ReferenceBackend()))
    report = build_report(program, {}, model_name="Linear", mode="weights")
    why = "gemm: first, second: out-features 8 are not a multiple of 16"
    assert table_of(report.to_markdown()) == [[why, "(model)", "–", "–"]]
    assert [one.backend for one in report.layers[0].refusals[Phase.FORWARD]] == ["first", "second"]


def test_what_a_model_that_ran_was_refused_is_shown_too() -> None:
    model = nmcompile.compile(nn.Linear(8, 8), config=CompileConfig(ends="sparse"), backend=Picky())
    model(torch.randn(2, 8)).sum().backward()
    row = ["gemm: picky: out-features 8 are not a multiple of 16", *["(model)"] * 3]
    assert table_of(nmcompile.inspect(model).to_markdown()) == [row]


def cpu_reasons(layer: nn.Module, **pruning: Pruning) -> dict[str, list[Phase]]:
    """Return the reasons of the CPU backend, with their phases."""
    config = CompileConfig(layers={"_default": LayerConfig(**pruning)}, ends="sparse")  # type: ignore[arg-type]
    found = layers_by_refusal(nmcompile.analyze(layer, "dense", config=config, backend="cpu").layers)
    return {reason: [phase for phase in Phase if names[phase]] for reason, names in found.items()}


@needs_kernels
def test_the_cpu_backend_takes_all_of_training() -> None:
    assert "no faster kernel" not in str(report_of([8, 8, 8], backend="cpu"))


@needs_kernels
def test_the_cpu_backend_names_patterns_without_a_kernel() -> None:
    both = [Phase.FORWARD, Phase.BACKWARD]
    assert cpu_reasons(nn.Linear(8, 8), weight=Pruning("transposable", NMPattern(4, 8))) == {
        "prune: cpu: no native kernel for masks except greedy ones, and exact transposable ones of 2:4": both,
        "gemm: cpu: no sparse kernel for 4:8, only for patterns that keep two of four": both,
    }


@needs_kernels
def test_the_cpu_backend_names_layers_without_a_kernel() -> None:
    found = cpu_reasons(nn.Conv3d(8, 8, 3), update_gradient=Pruning("mvue", NMPattern(2, 4)))
    assert found == {"gemm: cpu: no sparse kernel for conv3d": [Phase.UPDATE]}


@needs_kernels
def test_the_cpu_backend_names_the_operand_that_it_needs() -> None:
    found = cpu_reasons(nn.Linear(8, 8), input=Pruning("greedy", NMPattern(2, 4)))
    assert list(found) == [
        "gemm: cpu: the weight is not pruned for this GEMM; the sparse kernel takes no other operand"
    ]
