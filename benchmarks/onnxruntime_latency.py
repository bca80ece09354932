"""Whole networks in ONNX Runtime on one core, as nmcompile exports them, over its own static INT8 of all layers.

Sessions take turns, so a busy machine slows all of them. Ratios are those of medians. Writing the files takes minutes;
`--files` keeps them for the next run.

python benchmarks/onnxruntime_latency.py   # writes benchmarks/results/onnxruntime_latency.json
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
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

PRUNED = "nmcompile 2:4, 4-bit, 4:8 inputs"
DENSE = "nmcompile 2:4, 4-bit"
NATIVE = f"{PRUNED}, native operators"
NATIVE_DENSE = f"{DENSE}, native operators"
PEER = "ONNX Runtime static INT8, all layers"
UNPRUNED = {"_default": replace(presets["inference"], input=None)}
OURS = {
    DENSE: CompileConfig(layers=UNPRUNED, outputs="int8", ends="int8"),
    PRUNED: CompileConfig(outputs="int8", ends="int8"),
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


def files(
    model: nn.Module, x: Tensor, batches: list[Tensor], folder: Path, ours: Mapping[str, CompileConfig]
) -> dict[str, Path]:
    """Write a file of every variant, all with absorbed norms."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("fp32, dense", *ours, PEER)
    written = {name: folder / f"{number}.onnx" for number, name in enumerate(names)}
    if all(path.exists() for path in written.values()):
        return written
    nmcompile.export(nmcompile.compile(model, "dense", args=(x,)).eval(), written["fp32, dense"], (x,))
    for name, config in ours.items():
        compiled = nmcompile.compile(model, "inference", args=(x,), config=config, calibration=batches).eval()
        # With pruning by value, the output of a network with random weights changes by several percent in torch itself
        # if x is scaled by 1 + 1e-6. That cannot be compared end to end.
        nmcompile.export(compiled, written[name], (x,), verify="4:8" not in name)
    source = ort.InferenceSession(written["fp32, dense"], providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize_static(
        written["fp32, dense"], written[PEER], Batches(source, batches), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return written


def session(path: Path, native: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if native:
        nmcompile.onnxruntime.register(options)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def rows(name: str, batch: int, repeats: int, folder: Path) -> list[dict[str, object]]:
    """Time all variants of one network, whose files are in the folder or come there."""
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    batches = [torch.randn(4, *IMAGE) for _ in range(2)]
    x = torch.randn(batch, *IMAGE)
    written = files(model, x, batches, folder, OURS)
    sessions = {variant: session(path) for variant, path in written.items()}
    sessions |= {NATIVE: session(written[PRUNED], native=True), NATIVE_DENSE: session(written[DENSE], native=True)}
    feeds = {variant: {one.get_inputs()[0].name: x.numpy()} for variant, one in sessions.items()}
    calls = {variant: partial(one.run, None, feeds[variant]) for variant, one in sessions.items()}
    if not all(np.isfinite(call()[0]).all() for call in calls.values()):
        raise SystemExit(f"{name}: an output is not finite")
    pairs = ((NATIVE, PRUNED), (NATIVE_DENSE, DENSE))
    if not all(np.array_equal(calls[native]()[0], calls[standard]()[0]) for native, standard in pairs):
        raise SystemExit(f"{name}: native operators give another output than standard operators")
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
    parser.add_argument("--files", type=Path, help="a folder for the files; those of an earlier run are taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnxruntime_latency.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        found = (rows(name, options.batch, options.repeats, folder / name) for name in options.networks)
        results = [row for part in found for row in part]
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    setting = {"onnxruntime": ort.__version__, "repeats": options.repeats} | cpu_setting()
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(setting | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
