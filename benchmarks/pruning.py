"""Pruning on the CPU against a copy of the same bytes and against the eager operator.

Outputs go into tensors that exist (a fresh one of 64 MB costs several copies in page faults alone).

    python benchmarks/pruning.py           # writes benchmarks/results/pruning.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from timing import in_turns, processor

from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.transposable import cpu_transposable_out
from nmcompile.pruning import transposable_mask
from nmcompile.pruning.packed import packed_shapes

Calls = dict[str, Callable[[], object]]


def transposable_calls(size: int) -> Calls:
    """The exact transposable 2:4 mask of a square weight: applied, and packed for the forward and the backward GEMM."""
    w = torch.randn(size, size)
    pruned, copy = torch.empty_like(w), torch.empty_like(w)
    packed = {}
    for name, dim in (("forward", 1), ("backward", 0)):
        values, indices = packed_shapes(tuple(w.shape), dim)
        packed[f"{name}_values"] = w.new_empty(values)
        packed[f"{name}_indices"] = w.new_empty(indices, dtype=torch.uint8)
    eager = torch.empty_like(w)
    return {
        "copy": lambda: copy.copy_(w),
        "mask applied": lambda: cpu_transposable_out(w, 0, 1, pruned=pruned),
        "both packed forms": lambda: cpu_transposable_out(w, 0, 1, **packed),
        "eager, mask applied": lambda: torch.mul(w, transposable_mask(w, "2:4"), out=eager),
    }


def rows_of(name: str, calls: Calls, repeats: int) -> list[list[object]]:
    found = in_turns(calls, repeats)
    medians = {call: statistics.median(values) for call, values in found.items()}
    return [[name, call, median, min(found[call]), median / medians["copy"]] for call, median in medians.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pruning.json")
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    rows = rows_of("transposable 2:4", transposable_calls(options.size), options.repeats)
    headers = ["operator", "call", "median ms", "least ms", "of a copy"]
    print(tabulate(rows, headers=headers, floatfmt=".2f"))
    options.out.parent.mkdir(exist_ok=True)
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}
    results = [dict(zip(headers, row, strict=True)) for row in rows]
    options.out.write_text(json.dumps({**setting, "size": options.size, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
