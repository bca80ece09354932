"""Without TensorRT nothing breaks except the calls that need it, and those say what to install."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nmcompile.backends.tensorrt import build_engine, tensorrt_support, torch_tensorrt_module
from nmcompile.errors import BackendUnavailable, ConfigError


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "torch_tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)


def test_support_has_the_reason() -> None:
    support = tensorrt_support()
    assert not support.ok
    assert "pip install tensorrt" in support.reason and "tensorrt_rtx" in support.reason


def test_building_needs_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="pip install tensorrt"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.plan")


@pytest.mark.parametrize("batch", [(2, 1, 3), (1, 3, 2), (0, 1, 1)])
def test_an_unordered_batch_is_an_error(tmp_path: Path, batch: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="smallest <= typical <= largest"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.plan", batch=batch)


def test_the_second_flavour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("tensorrt_rtx")
    module.__version__ = "1.7"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    assert tensorrt_support().reason == "tensorrt_rtx 1.7"


def test_torch_tensorrt_is_asked_for_by_name() -> None:
    with pytest.raises(BackendUnavailable, match="pip install torch-tensorrt"):
        torch_tensorrt_module(nn.Linear(8, 8), (torch.ones(2, 8),))


@pytest.mark.parametrize("exported", [False, True])
def test_torch_tensorrt_is_called_with_sparse_weights(monkeypatch: pytest.MonkeyPatch, exported: bool) -> None:
    """A stand-in runs its program, which shows that program and settings arrive."""
    seen: dict[str, Any] = {}

    def compile_program(program: torch.export.ExportedProgram, inputs: Any, **settings: Any) -> nn.Module:
        seen.update(settings)
        return program.module()

    module: Any = type(sys)("torch_tensorrt")
    module.dynamo = type(sys)("torch_tensorrt.dynamo")
    module.dynamo.compile = compile_program
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    model, x = nn.Linear(8, 8).eval(), torch.ones(2, 8)
    compiled = torch_tensorrt_module(torch.export.export(model, (x,)) if exported else model, (x,), min_block_size=1)
    torch.testing.assert_close(compiled(x), model(x))
    assert seen == {"sparse_weights": True, "min_block_size": 1}
