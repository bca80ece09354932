"""Runtimes that cannot run a file: a note for ONNX's own evaluator, an error for ONNX Runtime."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import nmcompile
from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.errors import ExportError, LibraryError
from nmcompile.export import Example, OnnxReport, Verification, verify_onnx
from nmcompile.export.check import compare_runtimes
from nmcompile.export.check.run_file import onnxruntime_runner, reference_runner
from nmcompile.export.collect_layers import deployed_layers

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Written:
    """A quantized model and its file."""

    model: nn.Module
    report: OnnxReport

    def verify(self, path: Path | None = None) -> Verification:
        report = replace(self.report, path=path or self.report.path)
        return verify_onnx(report, deployed_layers(self.model), self.model, [Example((X,))])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model = nmcompile.compile(net, "inference", args=(X,), calibration=[X]).eval()
    return Written(model, nmcompile.export(model, tmp_path_factory.mktemp("m") / "m.onnx", (X,), verify=False).onnx)


class Gather(nn.Module):
    """A gather from more choices than onnx's evaluator has for GatherElements."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 128), nn.Linear(128, 8)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.c(torch.gather(self.b(self.a(x).relu()).relu(), 1, index))


def test_what_the_reference_evaluator_does_not_implement_is_a_note(tmp_path: Path) -> None:
    args = torch.randn(3, 16), torch.randint(0, 128, (3, 128))
    compiled = nmcompile.compile(Gather().eval(), "inference", args=args, calibration=[args]).eval()
    report = nmcompile.export(compiled, tmp_path / "m.onnx", args)
    assert report.verification is not None
    assert [check.runtime for check in report.verification.runtimes] == ["ONNX Runtime"]
    [note] = report.verification.notes
    assert note.startswith("not compared in onnx.reference, which cannot run the file: ValueError: ") and note in str(
        report
    )
    other = torch.randn(5, 16), torch.randint(0, 128, (5, 128))
    torch.testing.assert_close(
        OnnxRuntimeModel(tmp_path / "m.onnx")(*other), compiled(*other).detach(), rtol=1e-4, atol=1e-5
    )


class Failure(Exception):
    """An exception of an unexpected class."""


@pytest.mark.parametrize("place", ["__init__", "run"])
def test_whatever_the_reference_evaluator_raises_is_a_note(
    written: Written, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise Failure("\n\nno such operator\nand more")

    monkeypatch.setattr(ReferenceEvaluator, place, failing)
    found = written.verify()
    assert found.notes == ("not compared in onnx.reference, which cannot run the file: Failure: no such operator",)
    assert [check.runtime for check in found.runtimes] == ["ONNX Runtime"]


@pytest.mark.parametrize("fails_in_lockstep", [False, True])
def test_a_mismatch_in_the_reference_evaluator_still_counts(
    written: Written, fails_in_lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(proto: onnx.ModelProto) -> Any:
        run = reference_runner(proto)
        if fails_in_lockstep and len(proto.graph.output) > 1:
            raise LibraryError("no such operator")
        return lambda feeds: [output * 2 if output.dtype == np.float32 else output for output in run(feeds)]

    monkeypatch.setattr(compare_runtimes, "reference_runner", load)
    with pytest.raises(ExportError, match=r"onnx\.reference"):
        written.verify()


def test_a_file_that_onnx_runtime_does_not_take_is_an_error_of_the_export(written: Written, tmp_path: Path) -> None:
    proto = onnx.load(written.report.path)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run the file: .*rank"):
        onnxruntime_runner(proto, "onnxruntime")({proto.graph.input[0].name: np.zeros(8, np.float32)})
    proto.graph.node[-1].domain = "com.example"
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(proto, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load the file: .*com\.example"):
        written.verify(tmp_path / "other.onnx")
