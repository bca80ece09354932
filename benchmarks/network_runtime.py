"""Whole networks in integers on the CPU: `nmcompile.runtime` over ONNX Runtime's static INT8 of all layers.

Beside it the compiled module itself, frozen, and dense fp32.

All take turns in one process, so a busy machine slows all of them. Ratios are those of medians. Writing the peers'
files takes minutes; `--files` keeps them for the next run.

python benchmarks/network_runtime.py   # writes benchmarks/results/network_runtime.json
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime as ort
import torch
from craft import load_craft
from onnxruntime_latency import NATIVE, OURS, PEER, PRUNED, files, session
from tabulate import tabulate
from timing import cpu_setting, in_turns
from torch import Tensor, nn
from vision import models

import nmcompile

UNPRUNED = "nmcompile 2:4, 4-bit"
SIZES = {"resnet18": 224, "mobilenet_v2": 224, "vgg16": 224, "craft": 640}


def network(name: str) -> nn.Module:
    return (load_craft() if name == "craft" else models.get_model(name, weights=None)).eval()


def calls_of(model: nn.Module, x: Tensor, batches: list[Tensor], folder: Path) -> dict[str, Callable[[], object]]:
    """Return a call of each candidate on the same input."""
    written = files(model, batches[0], batches, folder, {PRUNED: OURS[PRUNED]})
    calls: dict[str, Callable[[], object]] = {"PyTorch fp32, dense": partial(model, x)}
    for name in (UNPRUNED, PRUNED):
        compiled = nmcompile.compile(model, "inference", args=(x,), config=OURS[name], calibration=batches).eval()
        calls[f"{name}, runtime"] = partial(nmcompile.runtime(compiled, (x,)), x)
    # Only now: each compilation of these parameters ends the promise.
    nmcompile.freeze(compiled)
    calls[f"{PRUNED}, module, frozen"] = partial(compiled, x)
    for name, path in ("fp32, dense", written["fp32, dense"]), (PEER, written[PEER]), (NATIVE, written[PRUNED]):
        one = session(path, native=name == NATIVE)
        calls[f"ONNX Runtime: {name}"] = partial(one.run, None, {one.get_inputs()[0].name: x.numpy()})
    return calls


def rows(name: str, batch: int, repeats: int, folder: Path) -> list[dict[str, object]]:
    """Time all candidates on one network."""
    torch.manual_seed(0)
    size = SIZES[name]
    batches = [torch.randn(1, 3, size, size) for _ in range(2)]
    with torch.no_grad():
        calls = calls_of(network(name), torch.randn(batch, 3, size, size), batches, folder)
        for variant, call in calls.items():
            if not all(torch.as_tensor(one).isfinite().all() for one in _leaves(call())):
                raise SystemExit(f"{name}: a result of {variant} is not finite")
        found = in_turns(calls, repeats)
    medians = {variant: statistics.median(times) for variant, times in found.items()}
    peer = medians[f"ONNX Runtime: {PEER}"]
    return [
        {
            "network": name, "batch": batch, "repeats": repeats, "variant": variant, "median ms": median,
            "least ms": min(found[variant]), "speed, static INT8 = 1": peer / median,
        }
        for variant, median in medians.items()
    ]  # fmt: skip


def _leaves(result: object) -> list[object]:
    return [leaf for one in result for leaf in _leaves(one)] if isinstance(result, list | tuple) else [result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--files", type=Path, help="a folder for the files; those of an earlier run are taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "network_runtime.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        cases = [(name, batch) for name in options.networks for batch in options.batches]
        cases = [(name, batch) for name, batch in cases if name != "craft" or batch == 1]
        results = [row for name, batch in cases for row in rows(name, batch, options.repeats, folder / name)]
    print(tabulate(results, headers="keys", floatfmt=".2f"))
    setting = {"onnxruntime": ort.__version__} | cpu_setting()
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(setting | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
