"""The HTML report: its data, and the page itself in a headless Chromium."""

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmcompile
from nmcompile import CompileConfig, Phase
from nmcompile.report.report import Report
from nmcompile.report.to_html import LIBRARIES, PAGE, page_data, to_html
from tests.report.browser import browse, checks_of, needs_browser

NAMES = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "esc\x1b[31m\u202e")
"""Names of layers that would be markup, would end the script, or would not be seen."""
CHECK = Path(__file__).parent / "check_page.html"
"""A page that presses the report's buttons in a frame, and tells what it saw."""


class Blocks(nn.Module):
    """Equal blocks, and layers with names from hell."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(5))
        for name in NAMES:
            self.add_module(name, nn.Linear(8, 8))
        self.odd = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for name in NAMES:
            x = self.get_submodule(name)(x)
        result: Tensor = self.odd(x)
        return result


def inspected(config: CompileConfig | None = None) -> tuple[nn.Module, Report]:
    """Return a compiled model that ran, and its report."""
    x = torch.randn(4, 8)
    model = nmcompile.compile(Blocks(), args=(x,), config=config)
    model(x).sum().backward()
    return model, nmcompile.inspect(model)


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_the_report_and_every_layer() -> None:
    model, report = inspected()
    data = data_of(to_html(report))
    assert model is not None and data["report"] == json.loads(report.to_json())
    assert [layer["note"] for layer in data["layers"]] == [layer.note for layer in report.layers]
    folded = sorted(index for fold in data["folds"] for index in fold["layers"])
    assert folded == list(range(len(report.layers)))
    assert {"blocks.[1-4].0", "blocks.[0-4].2", "odd"} <= {fold["name"] for fold in data["folds"]}


def test_the_page_is_one_file_without_names_as_markup() -> None:
    page = to_html(inspected()[1])
    assert page.count("<script") == 1 + len(LIBRARIES) + 1 and "alert(1)>" not in page and "<script>alert" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.split('id="data"')[0])
    assert "default-src 'none'" in page and len(page) < 3_000_000


def test_libraries_stand_with_version_and_licence() -> None:
    vendor = PAGE / "vendor"
    told = (vendor / "README.md").read_text(encoding="utf-8")
    for name in LIBRARIES:
        assert name in told and (vendor / f"{name.split('.')[0]}.LICENSE").read_text(encoding="utf-8")
        assert "</script" not in (vendor / name).read_text(encoding="utf-8").lower()


def test_masks_are_those_of_the_live_model() -> None:
    model, report = inspected()
    layers = {layer.name: data["tile"] for layer, data in zip(report.layers, page_layers(report), strict=True)}
    effective = weight_of(nmcompile.finalize(model), "blocks.3.2")
    tile = layers["blocks.3.2"]
    assert tile["rows"] == tuple("".join("01"[int(one != 0)] for one in row) for row in effective)
    assert tile["kept"] == {"in": {2: 16}, "out": {2: 16}} and tile["block"] == 4
    dense = weight_of(model, "blocks.3.2")
    assert tile["magnitude"] == pytest.approx(float(effective.abs().sum() / dense.abs().sum()))
    assert layers["odd"] is None


def weight_of(model: nn.Module, layer: str) -> Tensor:
    return model.get_parameter(f"{layer}.weight").detach().double()


def test_masks_are_looked_at_without_a_change() -> None:
    model, report = inspected()
    before = json.dumps(nmcompile.inspect(model).to_json()), str(nmcompile.sparse_state_dict(model))
    page_data(report)
    assert (json.dumps(nmcompile.inspect(model).to_json()), str(nmcompile.sparse_state_dict(model))) == before


def test_a_model_that_is_gone_has_no_masks() -> None:
    model, report = inspected()
    assert any(layer["tile"] for layer in page_layers(report))
    del model
    assert not any(layer["tile"] for layer in page_layers(report))


def page_layers(report: Report) -> list[Any]:
    layers = page_data(report)["layers"]
    assert isinstance(layers, list)
    return layers


def test_a_report_is_pickled_without_the_model_and_copied_with_it() -> None:
    model, report = inspected()
    loaded = pickle.loads(pickle.dumps(report))
    assert str(loaded) == str(report) and not list(loaded.masks())
    assert to_html(loaded)
    for copied in (copy.copy(report), copy.deepcopy(report)):
        assert len(list(copied.masks())) == len(list(report.masks())) > 0
    del model


def test_graphs_have_every_node_with_its_kind_and_known_shapes() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU()), torch.randn(4, 8, 6, 6)
    report = nmcompile.analyze(model, "training", args=(x,), config=CompileConfig(ends="sparse"))
    data = data_of(to_html(report))
    (graphs,) = data["graphs"]
    graph = report.layers[0].graphs
    for phase, result in zip(Phase, ([4, 12, 4, 4], [4, 8, 6, 6], [12, 8, 3, 3]), strict=True):
        nodes = graphs[phase.value]["nodes"]
        names = [
            str(n.target) if n.op == "placeholder" else n.name for n in graph[phase].graph.nodes if n.op != "output"
        ]
        assert [node["name"] for node in nodes] == names
        assert [node["shape"] for node in nodes if node["kind"] == "gemm"] == [result]
    assert {node["label"] for node in data["graph"]["nodes"]} >= {"conv2d", "relu"}


def test_bytes_are_those_of_kept_values_with_two_bits_each() -> None:
    report = nmcompile.analyze(nn.Linear(8, 16, bias=False), "weights", config=CompileConfig(ends="sparse"))
    assert report.summary["bytes"] == {"dense": 8 * 16 * 4, "stored": 8 * 16 // 2 * (32 + 2) // 8}


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_in_a_browser(width: int, tmp_path: Path) -> None:
    model, report = inspected()
    report.to_html(tmp_path / "report.html")
    scripts = 1 + len(LIBRARIES) + 1
    told = checks_of(CHECK, tmp_path / "report.html", tmp_path / "profile", WIDTH=width, SCRIPTS=scripts)
    assert model is not None and len(told) == 17


@needs_browser
def test_the_page_prints(tmp_path: Path) -> None:
    inspected()[1].to_html(tmp_path / "report.html")
    browse(tmp_path / "report.html", tmp_path / "profile", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
