"""The short report, written out for three models, and its size for models that are large or odd."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import nmcompile
from nmcompile import CompileConfig
from nmcompile.report.report import Report

GOLDEN = Path(__file__).parent / "golden"
MOST_LINES, MOST_COLUMNS = 60, 100


def small() -> Report:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    return nmcompile.analyze(model, "inference", args=(torch.randn(2, 4, 6, 6),), backend="reference")


def resnet50() -> Report:
    from torchvision.models import resnet50

    return nmcompile.analyze(resnet50(), args=(torch.randn(4, 3, 32, 32),), backend="reference")


def llama() -> Report:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=30,
        vocab_size=97,
    )
    model = LlamaForCausalLM(config)
    return nmcompile.analyze(model, args=(torch.arange(8).reshape(2, 4),), backend="reference")


MODELS: dict[str, Callable[[], Report]] = {"small": small, "resnet50": resnet50, "llama": llama}


@pytest.mark.parametrize("name", MODELS)
def test_the_report_is_as_written(name: str) -> None:
    report = MODELS[name]()
    assert str(report) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")
    assert len(report.full().splitlines()) > len(report.layers)


class Odd(nn.Module):
    """Layers of different shapes with long names, of all kinds that are left dense, and modules that are not layers."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(60):
            self.add_module(f"{'long' * 40}_{number}_{'x' * number}", nn.Linear(4 * (number + 1), 4 + number))
        for number in range(30):
            self.add_module(f"other{number}{'y' * number}", nn.ConvTranspose2d(4, 4, number + 1, groups=2))
            self.add_module(f"recurrent{'z' * number}", nn.GRU(4, 4))


@pytest.mark.parametrize("mode", ["training", "inference", "dense"])
def test_any_report_fits_a_screen(mode: str) -> None:
    report = nmcompile.analyze(Odd(), mode, config=CompileConfig(ends="sparse"))
    lines = str(report).splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= MOST_COLUMNS
    assert re.search(r"smaller rows, of \d\d layers: print\(report.full\(\)\)", str(report))
    assert all(layer.name[:60] in report.full() for layer in report.layers)


@pytest.mark.parametrize(("scale", "shown"), [(1, "18/12 = 1.50"), (1000, "18000/12000 = 1.50")])
def test_measured_times_are_sums_over_a_fold(scale: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmcompile.ir.choice import Choice
    from nmcompile.ir.program import ThreeGraphs

    choice = Choice("sparse", "measured", 1.4, 0.003 * scale, 0.002 * scale)
    monkeypatch.setattr(ThreeGraphs, "choices", lambda _: dict.fromkeys(nmcompile.Phase, choice))
    model = nmcompile.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config=CompileConfig(ends="sparse"))
    model(torch.randn(4, 8)).sum().backward()
    text = str(nmcompile.inspect(model))
    assert "[0-1] ×2" in text and shown in text


def test_reasons_are_numbered_once_and_cited() -> None:
    text = str(small())
    (number,) = [line.split(":")[0] for line in text.splitlines() if "first layer, not pruned" in line]
    (row,) = [line for line in text.splitlines() if line.startswith("0 ")]
    assert row.split()[-1] == number


def test_notebooks_show_a_table_with_names_as_text() -> None:
    model = nn.Module()
    for name in ("<img src=x onerror=alert(1)>", "</table><script>alert(2)</script>", "esc\x1b[31m"):
        model.add_module(name, nn.Linear(8, 8))
    html = nmcompile.analyze(model, "weights", config=CompileConfig(ends="sparse"))._repr_html_()
    assert "<table>" in html and "&lt;img src=x onerror=alert(1)&gt;" in html and r"esc\x1b[31m" in html
    assert "<img" not in html and "<script" not in html and "\x1b" not in html
