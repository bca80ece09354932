"""Each layer of a network in `nmcompile.runtime` and in ONNX Runtime's static INT8: kernel, bytes of weights, time.

Both profile themselves: the least of several calls for each step, and for each node. Everything that is not a layer is
one row.

python benchmarks/network_layers.py   # writes benchmarks/results/network_layers.json
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import onnxruntime as ort
import torch
from network_runtime import SIZES, network
from onnxruntime_latency import OURS, PEER, PRUNED, files
from tabulate import tabulate
from timing import cpu_setting
from torch import Tensor, nn

import nmcompile

LAYERS = {"QLinearConv", "QGemm", "QLinearMatMul"}
OTHERS = "all else"


def ours(model: nn.Module, x: Tensor, batches: list[Tensor], calls: int) -> dict[str, tuple[str, int, float]]:
    """Return kernel, bytes and milliseconds by layer."""
    compiled = nmcompile.compile(model, "inference", args=(x,), config=OURS[PRUNED], calibration=batches).eval()
    profile = nmcompile.runtime(compiled, (x,)).profile(x, calls=calls)
    found = {
        row.layer: (row.form, row.bytes, 1e3 * seconds)
        for row, seconds in zip(profile.rows, profile.seconds, strict=True)
        if row.bytes is not None
    }
    return found | {OTHERS: ("", 0, 1e3 * sum(profile.seconds) - sum(ms for *_, ms in found.values()))}


def theirs(path: Path, x: Tensor, calls: int, folder: Path) -> dict[str, float]:
    """Return milliseconds by layer, from ONNX Runtime's profiler."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(calls):
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    least: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"].removesuffix("_kernel_time").partition("_token_")[0]
            least[key] = min(least[key], event["dur"] / 1e3)
    layers = {name: ms for (operator, name), ms in least.items() if operator in LAYERS}
    return layers | {OTHERS: sum(least.values()) - sum(layers.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", choices=list(SIZES))
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--files", type=Path, help="a folder for the files; those of an earlier run are taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "network_layers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, model = SIZES[options.network], network(options.network)
    batches, x = [torch.randn(1, 3, size, size) for _ in range(2)], torch.randn(1, 3, size, size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.files or Path(temporary)) / options.network
        written = files(model, batches[0], batches, folder, {PRUNED: OURS[PRUNED]})
        theirs_found = theirs(written[PEER], x, options.calls, Path(temporary))
    weights = {name: module.weight.numel() for name, module in model.named_modules() if hasattr(module, "weight")}
    rows = [
        {
            "layer": name, "kernel": kernel, "bytes": size, "bytes, INT8": weights.get(name, 0), "ms": ms,
            "ms, INT8": theirs_found.get(name), "speed, INT8 = 1": theirs_found[name] / ms,
        }
        for name, (kernel, size, ms) in ours(model, x, batches, options.calls).items()
    ]  # fmt: skip
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    setting = {"onnxruntime": ort.__version__, "calls": options.calls, "network": options.network} | cpu_setting()
    options.out.write_text(json.dumps(setting | {"results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
