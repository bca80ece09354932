"""The command line."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import nmcompile
from nmcompile.cli import cli, main

FACTORY = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))

def sized(width):
    return nn.Linear(width, width)

def number():
    return 3

model = build()
three = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a module with a factory, importable under this name."""
    (tmp_path / "cli_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return "cli_models"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def test_help_lists_the_commands() -> None:
    shown = run("--help").output
    assert all(f"\n  {name} " in shown for name in cli.commands)


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_has_help(command: str) -> None:
    result, text = run(command, "--help"), cli.commands[command].help
    assert result.exit_code == 0
    assert text is not None and text[:20] in result.output


def test_demo_help_says_its_defaults() -> None:
    shown = run("demo", "--help").output
    assert "--data" in shown and "60000" in shown and "Never downloads" in shown


def test_analyze_prints_the_report(package: str) -> None:
    result = run("analyze", f"{package}:build", "--input", "f32[2, 3,6,6]", "--mode", "weights")
    model = importlib.import_module(package).build()
    expected = nmcompile.analyze(model, "weights", args=(torch.zeros(2, 3, 6, 6),), predict=True)
    assert (result.exit_code, result.output) == (0, f"{expected}\n")


def test_analyze_prints_json_and_markdown(package: str) -> None:
    data = json.loads(run("analyze", f"{package}:build", "--json").output)
    assert data["mode"] == "training" and [layer["name"] for layer in data["layers"]] == ["0", "2", "4"]
    assert run("analyze", f"{package}:build", "--markdown").output.startswith("# Sequential, mode 'training'")


def test_analyze_prints_every_layer_on_request(package: str) -> None:
    expected = nmcompile.analyze(importlib.import_module(package).build()).full()
    assert run("analyze", f"{package}:build", "--full").output == f"{expected}\n"


def test_analyze_writes_a_page_beside_what_it_prints(package: str, tmp_path: Path) -> None:
    result = run("analyze", f"{package}:build", "--html", str(tmp_path / "report.html"))
    assert result.output == run("analyze", f"{package}:build").output
    assert "Sequential, training" in (tmp_path / "report.html").read_text(encoding="utf-8")


NO_FACTORY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no module": (("analyze", "nowhere_at_all:build"), ("'nowhere_at_all:build'", "package.module:factory")),
    "no factory": (("analyze", "cli_models:bild"), ("'cli_models:bild'", "package.module:factory")),
    "no colon": (("analyze", "cli_models"), ("'cli_models'", "package.module:factory")),
    "nothing": (("analyze", ""), ("package.module:factory",)),
    "relative": (("analyze", ".cli_models:build"), ("'.cli_models:build'", "package.module:factory")),
    "a number": (("analyze", "cli_models:three"), ("'cli_models:three'", "of type int", "without arguments")),
    "a model": (("analyze", "cli_models:model"), ("'cli_models:model'", "of type Sequential", "without arguments")),
    "an argument": (("analyze", "cli_models:sized"), ("'cli_models:sized'", "'width'", "without arguments")),
    "no model": (("export", "cli_models:number", "m.onnx", "--input", "f32[2,3]"), ("cli_models:number", "type int")),
}
BAD = NO_FACTORY | {
    "mode": (("analyze", "cli_models:build", "--mode", "weight"), ("did you mean 'weights'",)),
    "input": (("analyze", "cli_models:build", "--input", "f33[2,3]"), ("'f33[2,3]'", "f32[8,3,224,224]", "bf16")),
    "input shape": (("analyze", "cli_models:build", "--input", "f32[2,5,6,6]"), ("float32[2, 5, 6, 6]", "pass args=")),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_without_a_traceback(
    case: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, fragments = BAD[case]
    monkeypatch.setattr(sys, "argv", ["nmcompile", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    assert left.value.code == (2 if case in NO_FACTORY else 1) and not shown.out
    assert shown.err.startswith("nmcompile: ") and shown.err.count("\n") == 1
    assert [text for text in fragments if text not in shown.err] == []


CALIBRATED = """
import torch

def batches():
    return [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))]
"""


def test_export_inspect_and_verify(package: str, tmp_path: Path) -> None:
    (tmp_path / "cli_data.py").write_text(CALIBRATED)
    path = str(tmp_path / "m.onnx")
    result = run("export", f"{package}:build", path, "--input", "f32[2,3,6,6]", "--calibration", "cli_data:batches")
    assert result.exit_code == 0 and "2:4 s4" in result.output
    assert "INT8" in run("inspect", path).output
    weights = json.loads(run("inspect", path, "--json").output)["weights"]
    assert [(one["op"], one["shape"]) for one in weights] == [
        ("Conv", [8, 3, 3, 3]), ("Conv", [8, 8, 3, 3]), ("Gemm", [4, 32])
    ]  # fmt: skip
    assert "2:4" in weights[1]["patterns"] and weights[1]["zeros"] >= 0.5
    verified = run("verify", path)
    assert verified.exit_code == 0 and "every block holds" in verified.output
    assert run("verify", path, "--pattern", "1:4").exit_code == 1


OTHERS = """
from torch import nn

class Standardized(nn.Sequential):
    def forward(self, x):
        return super().forward((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))

def standardized():
    return Standardized(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

def words():
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
"""


@pytest.fixture
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with a module that is on no path."""
    (tmp_path / "cli_others.py").write_text(OTHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "cli_others", raising=False)
    return tmp_path


def test_modules_in_the_current_folder_are_found(current_folder: Path) -> None:
    result = run("analyze", "cli_others:words", "--input", "i64[2,3]")
    assert result.exit_code == 0 and "Sequential" in result.output


@pytest.mark.parametrize(("model", "example"), [("standardized", "f32[2,8]"), ("words", "i64[2,3]")])
def test_export_compares_on_inputs_that_are_not_zero(
    current_folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, example: str
) -> None:
    seen: list[torch.Tensor] = []
    export = nmcompile.export

    def noted(compiled: nn.Module, path: Path, args: tuple[torch.Tensor], **options: str) -> Any:
        seen.extend(args)
        return export(compiled, path, args, container=options["container"])

    monkeypatch.setattr(nmcompile, "export", noted)
    for _ in range(2):
        result = run("export", f"cli_others:{model}", "m.onnx", "--mode", "weights", "--input", example)
        assert result.exit_code == 0 and "same top-1 100.0%" in result.output
    assert seen[0].any() and torch.equal(*seen)


def test_verify_says_that_nothing_is_pruned(package: str, tmp_path: Path) -> None:
    path = str(tmp_path / "m.onnx")
    run("export", f"{package}:build", path, "--input", "f32[2,3,6,6]", "--mode", "dense")
    result = run("verify", path)
    assert result.exit_code == 0 and "nothing in it is pruned" in result.output
    assert run("verify", path, "--pattern", "2:4").exit_code == 1
