"""Whole networks in ONNX Runtime on one core, as nmcompile exports them, over its own static INT8 of all layers.

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
from timing import cpu_setting, in_turns
from torch import Tensor, nn
from vision import models

import nmcompile
from nmcompile import CompileConfig, presets

PEER = "ONNX Runtime static INT8, all layers"
UNPRUNED = {"_default": replace(presets["inference"], input=None)}
OURS = {
    "nmcompile 2:4, 4-bit": CompileConfig(layers=UNPRUNED, outputs="int8", ends="int8"),
    "nmcompile 2:4, 4-bit, 4:8 inputs": CompileConfig(outputs="int8", ends="int8"),
    "nmcompile 2:4, 4-bit, ends and results in fp32": CompileConfig(layers=UNPRUNED),
}
NETWORKS = ("resnet18", "mobilenet_v2", "vgg16")
IMAGE = (3, 224, 224)


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
    for name, config in OURS.items():
        compiled = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=batches).eval()
        written[name] = folder / f"{len(written)}.onnx"
        # With pruning by value, the output of a network with random weights changes by several percent in torch itself
        # if x is scaled by 1 + 1e-6. That cannot be compared end to end.
        nmcompile.export(compiled, written[name], (x,), verify="4:8" not in name)
    source = ort.InferenceSession(written["fp32, dense"], providers=["CPUExecutionProvider"]).get_inputs()[0].name
    written[PEER] = folder / "peer.onnx"
    quantize_static(
        written["fp32, dense"], written[PEER], Batches(source, batches), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return written


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def rows(name: str, batch: int, repeats: int) -> list[dict[str, object]]:
    """Time all variants of one network."""
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    batches = [torch.randn(4, *IMAGE) for _ in range(2)]
    x = torch.randn(batch, *IMAGE)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {variant: session(path) for variant, path in files(model, x, batches, Path(folder)).items()}
        feeds = {variant: {one.get_inputs()[0].name: x.numpy()} for variant, one in sessions.items()}
        calls = {variant: partial(one.run, None, feeds[variant]) for variant, one in sessions.items()}
        if not all(np.isfinite(call()[0]).all() for call in calls.values()):
            raise SystemExit(f"{name}: an output is not finite")
        found = in_turns(calls, repeats)
    medians = {variant: statistics.median(values) for variant, values in found.items()}
    return [
        {
            "network": name, "batch": batch, "variant": variant, "median ms": median, "least ms": min(found[variant]),
            "speed, static INT8 = 1": medians[PEER] / median,
        }
        for variant, median in medians.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnxruntime_latency.json")
    options = parser.parse_args()
    results = [row for name in options.networks for row in rows(name, options.batch, options.repeats)]
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    setting = {"onnxruntime": ort.__version__, "repeats": options.repeats} | cpu_setting()
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(setting | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
