"""The Triton kernels that prune, beside a copy of the same tensor on the GPU, in bfloat16.

"packed" is the operand of a sparse GEMM: values and indices, in cuSPARSELt's order where a row names the library. "by
number" is the kernel for tensors whose blocks lie in the order of their numbers, which those of channels-last images
do not.

python benchmarks/gpu_pruning.py   # writes results/gpu_pruning.json; needs a CUDA device
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from timing import gpu_setting, on_gpu
from torch import Tensor

from nmcompile.backends.cusparselt.both_directions import compress_both
from nmcompile.backends.cusparselt.compress import compress
from nmcompile.backends.cusparselt.library import CUSPARSELT
from nmcompile.backends.cusparselt.operand import Operand, compressed
from nmcompile.backends.triton.layout import block_layout
from nmcompile.backends.triton.operators import triton_pack_lines, triton_prune, triton_prune_tiles
from nmcompile.backends.triton.operators import triton_transposable_mask as triton_mask
from nmcompile.backends.triton.support import triton_support
from nmcompile.pruning import NMPattern, draw_key

Calls = dict[str, Callable[[], object]]
GRADIENT = 16384, 4096  # tokens, out
IMAGES = 256, 256, 56, 56  # samples, channels, height, width
WEIGHTS = (4096, 1024), (8192, 8192)  # out, in
TWO_OF_FOUR = NMPattern(2, 4)


def gradient_calls(x: Tensor) -> Calls:
    key, copy = draw_key(device="cuda"), torch.empty_like(x)
    calls: Calls = {
        "copy": lambda: copy.copy_(x),
        "MVUE 1:2, dense": lambda: triton_prune(x, "mvue", 1, 2, 0, key),
        "MVUE 2:4, dense": lambda: triton_prune(x, "mvue", 2, 4, 0, key),
        "approx-MVUE 2:4, dense": lambda: triton_prune(x, "mvue_approx", 2, 4, 0, key),
        "MVUE 2:4, packed": lambda: triton_pack_lines(x, "mvue", 0, key),
        "approx-MVUE 2:4, packed": lambda: triton_pack_lines(x, "mvue_approx", 0, key),
        "greedy 2:4, packed": lambda: triton_pack_lines(x, "greedy", 0, None),
    }
    if CUSPARSELT.support().ok:
        operand = Operand(x, 0, None, "mvue", TWO_OF_FOUR, key)
        lines = operand.pruned().t().contiguous()
        calls["MVUE 2:4, packed for cuSPARSELt"] = lambda: compressed(CUSPARSELT, operand, x.shape[1], x.shape[0])
        calls["cuSPARSELt's own compression alone"] = lambda: compress(CUSPARSELT, lines)
    return calls


def image_calls(x: Tensor) -> Calls:
    from nmcompile.backends.triton.kernels.blocks import prune_by_number

    key, copy = draw_key(device="cuda"), torch.empty_like(x)
    last = x.contiguous(memory_format=torch.channels_last)
    layout, out = block_layout(last, last, 0, TWO_OF_FOUR.block), torch.empty_like(last)
    return {
        "copy": lambda: copy.copy_(x),
        "MVUE 1:2, along samples": lambda: triton_prune(x, "mvue", 1, 2, 0, key),
        "MVUE 2:4, along samples": lambda: triton_prune(x, "mvue", 2, 4, 0, key),
        "MVUE 1:2, along samples, channels last": lambda: triton_prune(last, "mvue", 1, 2, 0, key),
        "MVUE 2:4, along samples, channels last": lambda: triton_prune(last, "mvue", 2, 4, 0, key),
        "MVUE 2:4, along samples, channels last, by number": lambda: prune_by_number(
            last, "mvue", TWO_OF_FOUR, key, out, layout
        ),
        "greedy 4:8, along channels, channels last": lambda: triton_prune(last, "greedy", 4, 8, 1, None),
    }


def weight_calls(w: Tensor) -> Calls:
    copy, mask = torch.empty_like(w), triton_mask(w, 0, 1)
    calls: Calls = {
        "copy": lambda: copy.copy_(w),
        "transposable mask": lambda: triton_mask(w, 0, 1),
        "transposable mask, pruned and transposed": lambda: triton_prune_tiles(w),
        "PyTorch's greedy tiles": lambda: torch._sparse_semi_structured_tile(w, "largest_abs_values_greedy", False),
    }
    if CUSPARSELT.support().ok:
        rows, columns = w.shape

        forward, backward = Operand(w, 1, mask), Operand(w, 0, mask)

        def one_by_one() -> None:
            compressed(CUSPARSELT, forward, rows, columns)
            compressed(CUSPARSELT, backward, columns, rows)

        calls["masked and packed for cuSPARSELt, both directions, one by one"] = one_by_one
        calls["masked and packed for cuSPARSELt, both directions"] = lambda: compress_both(
            CUSPARSELT, forward, (rows, columns), (columns, rows)
        )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_pruning.json")
    options = parser.parse_args()
    if not triton_support().ok:
        raise SystemExit(triton_support().reason)
    torch.manual_seed(0)
    results = []
    calls_of = {"gradient": gradient_calls, "images": image_calls, "weight": weight_calls}
    for kind, shape in [("gradient", GRADIENT), ("images", IMAGES), *(("weight", shape) for shape in WEIGHTS)]:
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        calls = calls_of[kind](x)
        medians = {name: statistics.median(times) for name, times in on_gpu(calls, options.repeats).items()}
        copies = {name: time / medians["copy"] for name, time in medians.items()}
        results.append({"tensor": kind, "shape": shape, "milliseconds": medians, "copies": copies})
        title = f"{kind} {' x '.join(map(str, shape))}"
        print(tabulate([[name, medians[name], copies[name]] for name in medians], headers=[title, "ms", "copies"]))
    content = {**gpu_setting(), "repeats": options.repeats, "results": results}
    options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
