"""The sparse GEMMs of the CPU backend beside PyTorch's dense ones on the same pruned operands.

Every sparse call packs its operand with the mask applied, as a training step does. In `forward, packed ahead` the
weight is packed before the call, as it is without gradients. Outputs are compared first. The peers of linear layers:

- `F.linear`, and `mm` for its gradients (MKL);
- oneDNN's linear operator, the fastest dense path on AMD;
- PyTorch's own CSR product (float32 only), with a weight that was converted before.

The peers of convolutions are PyTorch's own, which run oneDNN.

python benchmarks/gemm.py   # writes results/gemm.json and, with matplotlib, results/gemm.svg
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bars import draw_bars
from tabulate import tabulate
from timing import in_turns, processor
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cpu.gemm import Geometry, masked, sparse_backward, sparse_forward, sparse_update
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.packed_weights import Packs
from nmcompile.pruning import OPERATORS, NMPattern, transposable_mask

Calls = dict[str, Callable[[], Tensor]]
LINEAR = (128, 768, 3072), (1024, 1024, 1024), (1024, 1024, 4096), (2048, 2048, 2048)  # tokens, in, out
# samples, in, out, height and width, kernel, stride
CONV = (
    (8, 64, 64, 56, 3, 1),
    (8, 128, 128, 28, 3, 1),
    (8, 256, 256, 14, 3, 1),
    (8, 512, 512, 7, 3, 1),
    (32, 512, 512, 7, 3, 1),
    (8, 128, 256, 28, 3, 2),
    (8, 256, 64, 56, 1, 1),
)
DTYPES = {torch.float32: "linear", torch.bfloat16: "linear-bf16"}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """The median times of one product, and its speed-up over each peer."""

    gemm: str
    phase: str
    threads: int
    milliseconds: dict[str, float]
    speedup: dict[str, float]


def linear_calls(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> Iterator[tuple[str, Calls]]:
    x, grad_output = torch.randn(tokens, inputs, dtype=dtype), torch.randn(tokens, outputs, dtype=dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    mask = transposable_mask(weight, "2:4")
    w, dy = masked(weight, mask), OPERATORS["greedy"].prune(grad_output, NMPattern(2, 4), 0, None)
    y, dx, dw = x.new_empty(tokens, outputs), torch.empty_like(x), torch.empty_like(weight)
    sparse = Geometry()
    dense: Calls = {
        "F.linear": lambda: F.linear(x, w),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
    }
    if dtype == torch.float32:  # CSR products do not take bfloat16
        csr = to_csr(w)
        dense["CSR"] = lambda: csr.mm(x.t()).t()

    def forward(packs: Packs | None = None) -> Tensor:
        return filled(y, sparse_forward(x, weight, mask, None, y, sparse, packs))

    yield "forward", {"sparse": forward, **dense}
    packs: Packs = []
    yield "forward, packed ahead", {"sparse": lambda: forward(packs), **dense}
    yield (
        "backward",
        {
            "sparse": lambda: filled(dx, sparse_backward(grad_output, weight, mask, dx, sparse)),
            "mm": lambda: grad_output.mm(w),
            "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(grad_output, w.t(), None, "none", [], ""),
        },
    )
    yield (
        "update",
        {
            "sparse": lambda: filled(dw, sparse_update(dy, x, dw, sparse, "flat", 4)),
            "mm": lambda: dy.t().mm(x),
            "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(dy.t(), x.t(), None, "none", [], ""),
        },
    )


def to_csr(weight: Tensor) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR warns that it is in beta
        return weight.to_sparse_csr()


def conv_calls(
    samples: int, inputs: int, outputs: int, size: int, kernel: int, stride: int, layout: torch.memory_format
) -> Iterator[tuple[str, Calls]]:
    padding = kernel // 2
    x = torch.randn(samples, inputs, size, size).contiguous(memory_format=layout)
    weight = torch.randn(outputs, inputs, kernel, kernel).contiguous(memory_format=layout)
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(transposable_mask(weight, "2:4", dims=(0, 1)))
    w, y = masked(weight, mask), F.conv2d(x, weight, None, stride, padding)
    grad_output, dx, dw = torch.randn_like(y), torch.empty_like(x), torch.empty_like(weight)
    dy = OPERATORS["greedy"].prune(grad_output, NMPattern(2, 4), 0, None).contiguous(memory_format=layout)
    geometry = Geometry((stride, stride), (padding, padding), (1, 1))

    def dense(gradient: Tensor, which: int) -> Tensor:
        wanted = [place == which for place in range(3)]
        options = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
        gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(gradient, x, w, None, *options)
        return gradients[which]

    yield (
        "forward",
        {
            "sparse": lambda: filled(y, sparse_forward(x, weight, mask, None, y, geometry)),
            "oneDNN": lambda: F.conv2d(x, w, None, stride, padding),
        },
    )
    packs: Packs = []
    yield (
        "forward, packed ahead",
        {
            "sparse": lambda: filled(y, sparse_forward(x, weight, mask, None, y, geometry, packs)),
            "oneDNN": lambda: F.conv2d(x, w, None, stride, padding),
        },
    )
    yield (
        "backward",
        {
            "sparse": lambda: filled(dx, sparse_backward(grad_output, weight, mask, dx, geometry)),
            "oneDNN": lambda: dense(grad_output, 0),
        },
    )
    yield (
        "update",
        {
            "sparse": lambda: filled(dw, sparse_update(dy, x, dw, geometry, "batch", 4)),
            "oneDNN": lambda: dense(dy, 1),
        },
    )


def filled(output: Tensor, done: bool) -> Tensor:
    assert done, "the operand is not 2:4"
    return output


def rows_of(gemm: str, phases: Iterator[tuple[str, Calls]], threads: int, repeats: int) -> Iterator[Row]:
    for phase, calls in phases:
        results = [call() for call in calls.values()]
        for other in results[1:]:
            exact = results[0].dtype == torch.float32
            torch.testing.assert_close(results[0], other, rtol=1e-4 if exact else 2**-7, atol=1e-3)
        medians = {name: statistics.median(times) for name, times in in_turns(calls, repeats).items()}
        ours = medians["sparse"]
        yield Row(gemm, phase, threads, medians, {name: t / ours for name, t in medians.items() if name != "sparse"})


def measure(repeats: int, threads: tuple[int, ...]) -> list[Row]:
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for dtype, kind in DTYPES.items():
            for shape in LINEAR:
                name = "{} {} x {} -> {}".format(kind, *shape)
                rows += rows_of(name, linear_calls(*shape, dtype), count, repeats)
        for samples, inputs, outputs, size, kernel, stride in CONV:
            for layout, memory_format in LAYOUTS.items():
                name = f"conv {samples} x {inputs} x {size}² -> {outputs}, {kernel}x{kernel}/{stride}, {layout}"
                calls = conv_calls(samples, inputs, outputs, size, kernel, stride, memory_format)
                rows += rows_of(name, calls, count, repeats)
    return rows


def means(rows: list[Row]) -> dict[str, float]:
    """Return geometric means over shapes, by kind of layer, phase, threads and peer."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for peer, ratio in row.speedup.items():
            kind, _, layout = row.gemm.partition(" ")[0], *row.gemm.rpartition(", ")[1:]
            name = " ".join([kind, layout if kind == "conv" else "", row.phase, f"{row.threads} threads, over {peer}"])
            found.setdefault(" ".join(name.split()), []).append(ratio)
    return {name: math.exp(statistics.fmean(map(math.log, ratios))) for name, ratios in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gemm.json")
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    rows = measure(options.repeats, tuple(dict.fromkeys(options.threads)))
    table = [
        [r.gemm, r.phase, r.threads, r.milliseconds["sparse"], *(f"{k} {v:.2f}" for k, v in r.speedup.items())]
        for r in rows
    ]
    print(tabulate(table, headers=["gemm", "phase", "threads", "ms", "times faster than"], floatfmt=".2f"))
    print(tabulate(means(rows).items(), headers=["geometric mean", ""], floatfmt=".2f"))
    options.out.parent.mkdir(exist_ok=True)
    setting = {"torch": torch.__version__, "machine": processor(), "repeats": options.repeats}
    results = [asdict(row) for row in rows]
    options.out.write_text(json.dumps({**setting, "means": means(rows), "results": results}, indent=2) + "\n")
    bars = {
        f"{row.gemm}: {row.phase}": min(ratio for peer, ratio in row.speedup.items() if peer != "CSR")
        for row in rows
        if row.threads == max(options.threads)
    }
    draw_bars(bars, "times faster than the best dense peer", ("as fast", 1.0), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
