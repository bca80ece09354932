"""ResNet-18 in ONNX Runtime on one core, as nmcompile exports it, beside ONNX Runtime's own static INT8 quantization.

Sessions take turns, so a busy machine slows all of them. Ratios are those of medians.

python benchmarks/onnxruntime_latency.py   # writes benchmarks/results/onnxruntime_latency.json
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from tabulate import tabulate
from timing import in_turns, processor
from torch import Tensor, nn
from vision import models

import nmcompile
from nmcompile import CompileConfig, presets

PEER = "ONNX Runtime static INT8, ends in fp32"
ENDS = ["conv1", "fc"]


class Batches(CalibrationDataReader):
    """A reader of calibration batches for `quantize_static`."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self.left: Iterator[dict[str, np.ndarray]] = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def files(model: nn.Module, x: Tensor, batches: list[Tensor], folder: Path) -> dict[str, Path]:
    """Write a file of every variant, all with absorbed norms."""
    written = {"fp32, dense": folder / "dense.onnx"}
    nmcompile.export(nmcompile.compile(model, "dense", args=(x,)).eval(), written["fp32, dense"], (x,))
    unpruned = {"_default": replace(presets["inference"], input=None)}
    for name, config in (
        ("nmcompile 2:4, 4-bit", CompileConfig(layers=unpruned, outputs="int8")),
        ("nmcompile 2:4, 4-bit, results in fp32", CompileConfig(layers=unpruned)),
        ("nmcompile 2:4, 4-bit, 4:8 inputs", CompileConfig(outputs="int8")),
    ):
        compiled = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=batches).eval()
        written[name] = folder / f"{len(written)}.onnx"
        # With pruning by value, the output of a network with random weights changes by several percent in torch itself
        # if x is scaled by 1 + 1e-6. That cannot be compared end to end.
        nmcompile.export(compiled, written[name], (x,), verify="4:8" not in name)
    source = ort.InferenceSession(written["fp32, dense"], providers=["CPUExecutionProvider"]).get_inputs()[0].name
    for name, excluded in ((PEER, ENDS), ("ONNX Runtime static INT8, all layers", [])):
        written[name] = folder / f"{len(written)}.onnx"
        quantize_static(
            written["fp32, dense"], written[name], Batches(source, batches), quant_format=QuantFormat.QDQ,
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=excluded,
        )  # fmt: skip
    return written


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnxruntime_latency.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    batches = [torch.randn(4, 3, 224, 224) for _ in range(4)]
    x = torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: session(path) for name, path in files(model, x, batches, Path(folder)).items()}
        feeds = {name: {one.get_inputs()[0].name: x.numpy()} for name, one in sessions.items()}
        calls = {name: partial(one.run, None, feeds[name]) for name, one in sessions.items()}
        found = in_turns(calls, options.repeats)
    medians = {name: statistics.median(values) for name, values in found.items()}
    rows = [[name, median, min(found[name]), medians[PEER] / median] for name, median in medians.items()]
    headers = ["ResNet-18, 224², batch 1, one core", "median ms", "least ms", "speed, static INT8 = 1"]
    print(tabulate(rows, headers=headers, floatfmt=".2f"))
    setting = {
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "machine": processor(),
        "repeats": options.repeats,
    }
    options.out.parent.mkdir(exist_ok=True)
    results = [dict(zip(("variant", "median ms", "least ms", "relative speed"), row, strict=True)) for row in rows]
    options.out.write_text(json.dumps(setting | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
