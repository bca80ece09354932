"""Fit the cost model of a typical CPU to results/gemm.json, and show how well it chooses.

The costs printed stand in `nmcompile/backends/cpu/typical_cost.py` if the results are those of its processor. Each
time is linear in the costs, and the relative errors of the measured times are least squares.

python benchmarks/fit_cpu_cost.py
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fit_gpu_cost import off, solved

from nmcompile.backends.cpu.cost import Costs, dense_seconds, dense_terms, sparse_seconds, sparse_terms

RESULTS = Path(__file__).parent / "results" / "gemm.json"
THREADS = 2
LINEAR = re.compile(r"linear (\d+) x (\d+) -> (\d+)$")
CONV = re.compile(r"conv (\d+) x (\d+) x (\d+)² -> (\d+), (\d+)x\d+/(\d+),")


class Row(NamedTuple):
    """The sizes of a product in float32, and the seconds of both kernels."""

    sizes: tuple[int, int, int]
    is_linear: bool
    dense: float
    sparse: float


def measured() -> list[Row]:
    """Return the measured products of operands that are packed in each call, over PyTorch's own kernels."""
    rows = []
    for one in json.loads(RESULTS.read_text())["results"]:
        is_linear = bool(LINEAR.match(one["gemm"]))
        if one["threads"] == THREADS and "packed" not in one["phase"] and (is_linear or CONV.match(one["gemm"])):
            times = {name: time * 1e-3 for name, time in one["milliseconds"].items()}
            dense = next(times[name] for name in ("F.linear", "mm", "oneDNN") if name in times)
            rows.append(Row(sizes_of(one["gemm"], one["phase"]), is_linear, dense, times["sparse"]))
    return rows


def sizes_of(gemm: str, phase: str) -> tuple[int, int, int]:
    """Return rows, depth and lanes of a product from its name."""
    if found := LINEAR.match(gemm):
        positions, inputs, outputs = map(int, found.groups())
        window = 1
    else:
        found = CONV.match(gemm)
        assert found is not None
        samples, inputs, size, outputs, kernel, stride = map(int, found.groups())
        positions, window = samples * (size // stride) ** 2, kernel**2
    sizes = {
        "forward": (outputs, inputs * window, positions),
        "backward": (inputs, outputs * window, positions),
        "update": (outputs, positions, inputs * window),
    }
    return sizes[phase]


def fitted(rows: Sequence[Row]) -> Costs:
    """Return the costs that fit the measured times best."""
    linear, convolution = ([row for row in rows if row.is_linear is kind] for kind in (True, False))
    multiply, read = solved([dense_terms(*row.sizes) for row in linear], [row.dense for row in linear])
    convolve, _ = solved([dense_terms(*row.sizes) for row in convolution], [row.dense for row in convolution])
    sparse = solved([sparse_terms(*row.sizes) for row in rows], [row.sparse for row in rows])
    return Costs(multiply, convolve, read, *sparse)


def main() -> None:
    rows = measured()
    costs = fitted(rows)
    print("TYPICAL = Costs(" + ", ".join(f"{name}={cost:.3g}" for name, cost in costs._asdict().items()) + ")\n")
    right = sum((speedup(row, costs) > 1) == (row.sparse < row.dense) for row in rows)
    ratios = [(speedup(row, costs), row.dense / row.sparse) for row in rows]
    print(f"{right} of {len(rows)} choices are right; {off(ratios)}")


def speedup(row: Row, costs: Costs) -> float:
    """Predict dense time / sparse time of a measured product."""
    return dense_seconds(costs, *row.sizes, row.is_linear) / sparse_seconds(costs, *row.sizes, is_packed=False)


if __name__ == "__main__":
    main()
