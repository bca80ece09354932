"""The native pruning kernels beside a copy of the same tensor, and beside the reference operators.

Calls take turns and write into reused buffers: a fresh buffer of 64 MB costs several copies in page faults, as the rows
with `clone` as their unit show. The first call of each group is its unit. A kernel that takes as long for elements in a
cache as for elements in memory is limited by its instructions. One thread is timed by its processor time, to which
other programs on the machine do not add.

python benchmarks/pruning.py   # 64 MB tensors; writes results/pruning.json and, with matplotlib, results/pruning.svg
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bars import draw_bars
from tabulate import tabulate
from timing import in_turns, processor
from torch import Tensor

from nmcompile import pruning
from nmcompile.backends.cpu.kernels import kernel_support
from nmcompile.backends.cpu.prune import call_kernel, cpu_prune, cpu_prune_out
from nmcompile.backends.cpu.prune_packed import cpu_prune_packed_out
from nmcompile.backends.cpu.transposable import cpu_transposable_mask, cpu_transposable_out
from nmcompile.pruning import OPERATORS, NMPattern, draw_key
from nmcompile.pruning.packed import packed_shapes
from nmcompile.pruning.transposable import transposable_mask

Calls = dict[str, Callable[[], object]]

SMALL = (1_000, 10_000, 100_000)  # elements
CACHED = 16  # rows
DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pruned:
    """A pruning operator and how to call it."""

    operator: str
    n_keep: int
    block: int
    relu: bool = False

    def into(self, out: Tensor, x: Tensor, dim: int, key: Tensor | None) -> None:
        cpu_prune_out(x, self.operator, self.n_keep, self.block, dim, out, key, self.relu)

    def fresh(self, x: Tensor, dim: int, key: Tensor | None) -> Tensor:
        pruned: Tensor = cpu_prune(x, self.operator, self.n_keep, self.block, dim, key, self.relu)
        return pruned

    def packed(self, values: Tensor, indices: Tensor, x: Tensor, dim: int, key: Tensor | None) -> None:
        operator, n_keep, block = self.operator, self.n_keep, self.block
        cpu_prune_packed_out(x, operator, n_keep, block, dim, values, indices, key, self.relu)

    def eager(self, x: Tensor, dim: int, key: Tensor | None) -> Tensor:
        dense = torch.relu(x) if self.relu else x
        return OPERATORS[self.operator].prune(dense, self.pattern, dim, key)

    @property
    def pattern(self) -> str:
        return f"{self.n_keep}:{self.block}"

    def key(self) -> Tensor | None:
        return draw_key() if OPERATORS[self.operator].needs_key else None


PRUNED = {
    "MVUE 1:2": Pruned("mvue", 1, 2),
    "MVUE 2:4": Pruned("mvue", 2, 4),
    "MVUE 4:8": Pruned("mvue", 4, 8),
    "approx-MVUE 2:4": Pruned("mvue_approx", 2, 4),
    "greedy 2:4": Pruned("greedy", 2, 4),
    "ReLU + greedy 4:8": Pruned("greedy_by_value", 4, 8, relu=True),
}


@dataclass(frozen=True)
class Row:
    """The times of a call, and its median relative to that of the unit."""

    operator: str
    call: str
    median_ms: float
    least_ms: float
    unit: str
    ratio: float


def rows_of(operator: str, calls: Calls, repeats: int) -> list[Row]:
    found = in_turns(calls, repeats, clock=time.perf_counter if torch.get_num_threads() > 1 else time.process_time)
    medians = {call: statistics.median(values) for call, values in found.items()}
    unit = next(iter(calls))
    return [
        Row(operator, call, median, min(found[call]), unit, median / medians[unit]) for call, median in medians.items()
    ]


def reused_buffers(x: Tensor, pruned: Pruned) -> Calls:
    """Time blocks along rows and along columns, and packed along rows if the format takes the pattern."""
    out, copy, key = torch.empty_like(x), torch.empty_like(x), pruned.key()
    calls: Calls = {
        "copy": lambda: copy.copy_(x),
        "along rows": lambda: pruned.into(out, x, 1, key),
        "along columns": lambda: pruned.into(out, x, 0, key),
    }
    if not pruned.relu:
        public = getattr(pruning, pruned.operator)
        calls["nmcompile.pruning, out="] = lambda: public(x, pruned.pattern, dim=1, out=out)
    if key is None and not pruned.relu:
        calls["mask, allocated"] = lambda: pruning.mask(x, pruned.pattern, dim=1)
    if pruned.block <= 4:
        values, indices = packed_shapes(tuple(x.shape), 1)
        packed = x.new_empty(values), x.new_empty(indices, dtype=torch.uint8)
        calls["packed"] = lambda: pruned.packed(*packed, x, 1, key)
    return calls


def fresh_buffers(x: Tensor, pruned: Pruned) -> Calls:
    key = pruned.key()
    return {"clone": x.clone, "along rows, allocated": lambda: pruned.fresh(x, 1, key)}


def beside_eager(x: Tensor, pruned: Pruned) -> Calls:
    key, out, eager_out = pruned.key(), torch.empty_like(x), torch.empty_like(x)
    return {
        "eager": lambda: eager_out.copy_(pruned.eager(x, -1, key)),
        f"{x.numel()} elements": lambda: pruned.into(out, x, -1, key),
    }


def transposable(w: Tensor) -> Calls:
    """Time the exact transposable 2:4 mask of a weight: applied, and packed for the forward and the backward GEMM."""
    pruned, copy = torch.empty_like(w), torch.empty_like(w)
    packed = {}
    for name, dim in (("forward", 1), ("backward", 0)):
        values, indices = packed_shapes(tuple(w.shape), dim)
        packed[f"{name}_values"] = w.new_empty(values)
        packed[f"{name}_indices"] = w.new_empty(indices, dtype=torch.uint8)
    return {
        "copy": lambda: copy.copy_(w),
        "mask applied": lambda: cpu_transposable_out(w, 0, 1, pruned=pruned),
        "both packed forms": lambda: cpu_transposable_out(w, 0, 1, **packed),
    }


def transposable_beside_eager(w: Tensor) -> Calls:
    return {
        "eager": lambda: transposable_mask(w, "2:4"),
        f"{w.numel()} elements": lambda: cpu_transposable_mask(w, 0, 1),
    }


def from_cache(x: Tensor, pruned: Pruned) -> Calls:
    """Time the kernel alone on as many elements from memory and from a part that a cache holds."""
    key, out, pattern = pruned.key(), torch.empty_like(x), NMPattern(pruned.n_keep, pruned.block)
    part, part_out = x[:CACHED].contiguous(), out[:CACHED].contiguous()

    def prune(x: Tensor, out: Tensor) -> None:
        call_kernel(x, pruned.operator, pattern, 1, key, pruned.relu, out)

    return {
        "one thread": lambda: prune(x, out),
        "one thread, in a cache": lambda: [prune(part, part_out) for _ in range(len(x) // CACHED)],
    }


def measure(size: int, repeats: int, eager_repeats: int) -> list[Row]:
    x = torch.randn(size, size)
    rows = []
    for dtype in DTYPES:
        cast = x.to(dtype)
        rows += rows_of(f"transposable 2:4, {dtype}", transposable(cast), repeats)
        for name, pruned in PRUNED.items():
            rows += rows_of(f"{name}, {dtype}", reused_buffers(cast, pruned), repeats)
            rows += rows_of(f"{name}, {dtype}", fresh_buffers(cast, pruned), repeats)
    with one_thread():
        for name, pruned in PRUNED.items():
            rows += rows_of(f"{name}, {torch.float32}", from_cache(x, pruned), repeats)
    for elements in SMALL:
        for name, pruned in PRUNED.items():
            rows += rows_of(f"{name}, {torch.float32}", beside_eager(torch.randn(elements), pruned), repeats)
        rows += rows_of(
            f"transposable 2:4, {torch.float32}", transposable_beside_eager(torch.randn(elements // 40, 40)), repeats
        )
    if eager_repeats:
        for name, pruned in PRUNED.items():
            rows += rows_of(f"{name}, {torch.float32}", beside_eager(x, pruned), eager_repeats)
        rows += rows_of(f"transposable 2:4, {torch.float32}", transposable_beside_eager(x), eager_repeats)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--eager-repeats", type=int, default=3, help="for the slow reference operators on whole tensors"
    )
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pruning.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if not kernel_support().ok:
        raise SystemExit(kernel_support().reason)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = measure(options.size, options.repeats, options.eager_repeats)
    print(tabulate([asdict(row) for row in rows], headers="keys", floatfmt=".3f"))
    options.out.parent.mkdir(exist_ok=True)
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}
    results = [asdict(row) for row in rows]
    options.out.write_text(json.dumps({**setting, "size": options.size, "results": results}, indent=2) + "\n")
    bars = {
        f"{row.operator.replace('torch.', '')}: {row.call}": row.ratio for row in rows if row.unit == "copy" != row.call
    }
    draw_bars(bars, "times of a copy of the same tensor", ("copy", 1.0), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
