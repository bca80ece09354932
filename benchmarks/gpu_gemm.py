"""2:4 linear layers on a GPU beside dense ones: the forward GEMM of a compiled layer with a cached, compressed weight.

Peers: `F.linear` (cuBLAS) and PyTorch's own `to_sparse_semi_structured` with cuSPARSELt, on the same pruned weight.
"sparse" always runs the sparse kernel; "compiled" is the layer, which runs the measured choice. The GPU is timed.

python benchmarks/gpu_gemm.py   # writes results/gpu_gemm.json and, with matplotlib, results/gpu_gemm.svg
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from curves import Curve, draw_curves
from tabulate import tabulate
from timing import gpu_setting, on_gpu
from torch import nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

import nmcompile
from nmcompile import CompileConfig
from nmcompile.backends.cusparselt.library import CUSPARSELT
from nmcompile.backends.cusparselt.operand import Operand
from nmcompile.backends.cusparselt.product import Product
from nmcompile.backends.cusparselt.support import operand_refusal
from nmcompile.weight_cache import weights_at_rest

TOKENS = 64, 512, 2048, 8192, 16384
LAYERS = {
    "ViT-L qkv": (1024, 3072),
    "ViT-L fc1": (1024, 4096),
    "ViT-L fc2": (4096, 1024),
    "Llama-8B qkv": (4096, 6144),
    "Llama-8B out": (4096, 4096),
    "Llama-8B up": (4096, 14336),
    "Llama-8B down": (14336, 4096),
    "ResNet-50 1x1": (1024, 512),
}
LARGE = 2048  # tokens: the summary counts layers with at least these


@dataclass(frozen=True)
class Row:
    """The median times of one layer, and the speed-up of each over `F.linear`."""

    layer: str
    dtype: str
    tokens: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]
    kernel: str


@torch.no_grad()
def measure(name: str, tokens: int, dtype: torch.dtype, repeats: int) -> Row:
    inputs, outputs = LAYERS[name]
    layer = nn.Linear(inputs, outputs, device="cuda", dtype=dtype)
    compiled = nmcompile.compile(layer, "weights", config=CompileConfig(ends="sparse"))
    x = torch.randn(tokens, inputs, device="cuda", dtype=dtype)
    compiled(x)
    weight = nmcompile.finalize(compiled).get_parameter("weight")
    product = Product(CUSPARSELT, Operand(weight, 1), x, layer.bias, weight=weight)
    calls = {"dense": lambda: F.linear(x, weight, layer.bias), "compiled": lambda: compiled(x)}
    with weights_at_rest():
        if product.multiply() is not None:
            calls["sparse"] = product.multiply
        if not inputs % 64 and not outputs % 64:
            SparseSemiStructuredTensor._FORCE_CUTLASS = False
            torchs = to_sparse_semi_structured(weight.detach())
            calls["torch"] = lambda: F.linear(x, torchs, layer.bias)
        for call in calls.values():
            torch.testing.assert_close(call(), calls["dense"](), rtol=2**-6, atol=1e-2)
        medians = {key: statistics.median(times) for key, times in on_gpu(calls, repeats).items()}
    choice = next(iter(nmcompile.inspect(compiled).layer("").choices.values()))
    speedup = {key: medians["dense"] / time for key, time in medians.items() if key != "dense"}
    return Row(name, str(dtype), tokens, medians, speedup, choice.kernel)


def measured(repeats: int, counts: Sequence[int]) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float16):
        if refusal := operand_refusal(CUSPARSELT, torch.ones(1, device="cuda", dtype=dtype)):
            print(f"{dtype}: {refusal}")
            continue
        for name in LAYERS:
            for tokens in counts:
                yield measure(name, tokens, dtype, repeats)


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def summary(rows: list[Row]) -> dict[str, float]:
    """Return the gain where a sparse kernel was chosen, and the worst of all layers, by dtype."""
    found = {}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        ours = [row for row in rows if row.dtype == dtype]
        large = [row.speedup["compiled"] for row in ours if row.tokens >= LARGE]
        paying = [row.speedup["compiled"] for row in ours if row.kernel == "sparse"]
        found[f"{dtype}: compiled, {LARGE} tokens and more"] = geomean(large)
        found[f"{dtype}: compiled, where sparse was chosen ({len(paying)} of {len(ours)})"] = geomean(paying or [1.0])
        found[f"{dtype}: compiled, the worst"] = min(row.speedup["compiled"] for row in ours)
        found[f"{dtype}: torch's, the worst"] = min(row.speedup.get("torch", math.inf) for row in ours)
    return found


def curves(rows: list[Row]) -> list[Curve]:
    """Return a line for the sparse kernel of each layer in bfloat16."""
    found = []
    for name, (inputs, outputs) in LAYERS.items():
        chosen = [row for row in rows if row.layer == name and row.dtype == str(torch.bfloat16)]
        style = {"marker": "o", "label": f"{name}, {inputs} to {outputs}"}
        found.append(Curve([row.tokens for row in chosen], [row.speedup["sparse"] for row in chosen], style))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_gemm.json")
    options = parser.parse_args()
    if not CUSPARSELT.support().ok:
        raise SystemExit(CUSPARSELT.support().reason)
    torch.manual_seed(0)
    rows = list(measured(options.repeats, options.tokens))
    table = [
        [r.dtype, r.layer, r.tokens, r.milliseconds["dense"], r.kernel, *(f"{k} {v:.2f}" for k, v in r.speedup.items())]
        for r in rows
    ]
    print(tabulate(table, headers=["dtype", "layer", "tokens", "dense ms", "chosen", "times faster"], floatfmt=".3f"))
    print(tabulate(summary(rows).items(), floatfmt=".2f"))
    results = {
        **gpu_setting(),
        "repeats": options.repeats,
        "summary": summary(rows),
        "results": list(map(asdict, rows)),
    }
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    label = "speed-up of the sparse kernel over F.linear"
    draw_curves(curves(rows), label, "", options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
