"""Deployment of the trained sparse model: quantize it, write it as ONNX, and run the file in ONNX Runtime."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import nmcompile
from nmcompile.backends.onnxruntime import OnnxRuntimeModel
from nmcompile.demo.images import Images
from nmcompile.demo.training import evaluate
from nmcompile.printable import table

CALIBRATION = 512


def deploy(dense: nn.Module, sparse: nn.Module, images: Images) -> str:
    """Return a text on accuracy and file size of the dense and the sparse 4-bit model, measured from their files."""
    args = (images.test_images[:2],)
    calibration = images.train_images[:CALIBRATION].split(128)
    config = nmcompile.CompileConfig(outputs="int8")  # integers on both sides of every kernel
    quantized = nmcompile.compile(sparse, "inference", args=args, config=config, calibration=calibration).eval()
    plain = nmcompile.compile(dense, mode="dense", args=args).eval()
    with tempfile.TemporaryDirectory() as folder:
        models = {"dense, fp32": (plain, "dense.onnx"), "sparse, 4-bit": (quantized, "sparse.onnx")}
        reports = {name: nmcompile.export(model, Path(folder) / file, args) for name, (model, file) in models.items()}
        rows = []
        for name, report in reports.items():
            accuracy, loss = evaluate(_Session(report.onnx.path), images)
            rows.append([name, accuracy, loss, report.onnx.bytes / 1e3])
    headers = ["run in ONNX Runtime, not retrained", "test accuracy, %", "test loss", "file, kB"]
    shown = table(rows, headers, floatfmt=("", ".2f", ".4f", ".0f"))
    return f"{shown}\n\n{reports['sparse, 4-bit'].verification}"


class _Session(nn.Module):
    """A module that runs an ONNX file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.model = OnnxRuntimeModel(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.model(x)
        assert isinstance(scores, torch.Tensor)
        return scores
