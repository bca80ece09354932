"""Fit the GPU's cost model to results/gpu_gemm.json and results/gpu_pruning.json, and show how well it chooses.

No GPU is needed. The coefficients printed stand in `nmcompile/backends/cusparselt/cost.py`. A product's time is linear
in its multiplications and its depth, and the relative errors of the measured times are least squares.

python benchmarks/fit_gpu_cost.py
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_gemm import LARGE, LAYERS
from tabulate import tabulate

from nmcompile.backends.cusparselt.cost import Copy, Product
from nmcompile.backends.cusparselt.support import Sizes

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """The sizes of a product, and the seconds of both kernels."""

    sizes: Sizes
    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        return self.dense / self.sparse


def measured() -> list[Row]:
    """Return the measured products with a compressed weight."""
    rows = []
    for one in read("gpu_gemm.json"):
        inputs, outputs = LAYERS[one["layer"]]
        times = {name: time * 1e-3 for name, time in one["milliseconds"].items()}
        rows.append(Row(Sizes(outputs, inputs, one["tokens"]), times["dense"], times["sparse"]))
    return rows


def read(name: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())["results"]
    return results


def fitted_products(rows: Sequence[Row]) -> tuple[Product, Product]:
    """Return the costs of the dense and of the sparse kernel."""
    terms = [(1, row.sizes.multiplications, row.sizes.depth) for row in rows]
    dense, sparse = (solved(terms, times) for times in ([r.dense for r in rows], [r.sparse for r in rows]))
    return Product(*dense), Product(*sparse)


def fitted_copy() -> Copy:
    """Return the costs of copying a tensor of bfloat16."""
    rows = read("gpu_pruning.json")
    terms = [(1, 4 * math.prod(row["shape"])) for row in rows]
    return Copy(*solved(terms, [row["milliseconds"]["copy"] * 1e-3 for row in rows]))


def solved(terms: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Return the cost of each term."""
    matrix, target = (torch.tensor(values, dtype=torch.float64) for values in (terms, times))
    scale = matrix.amax(0)
    costs = torch.linalg.lstsq(matrix / scale / target[:, None], torch.ones_like(target)[:, None]).solution[:, 0]
    found: list[float] = (costs / scale).tolist()
    return found


def choices(rows: Sequence[Row], dense: Product, sparse: Product) -> list[bool]:
    """Return for each product whether the model chooses the sparse kernel."""
    return [sparse.seconds(row.sizes) < dense.seconds(row.sizes) for row in rows]


def mean_speedup(rows: Sequence[Row], is_sparse: Callable[[Row], bool]) -> float:
    """Return the geometric mean of the speed-ups by a choice of kernels, over products of many tokens."""
    large = [row for row in rows if row.sizes.lanes >= LARGE]
    return statistics.geometric_mean(row.speedup if is_sparse(row) else 1.0 for row in large)


def off(ratios: Sequence[tuple[float, float]]) -> str:
    """Return how far predicted speed-ups are off the measured ones."""
    errors = sorted(abs(predicted / seen - 1) for predicted, seen in ratios)
    ends = f"{statistics.median(errors):.0%} in the median, and by {errors[int(0.9 * len(errors))]:.0%} at most"
    return f"speed-ups of {len(errors)} measured products were off by {ends} for nine in ten"


def main() -> None:
    rows = measured()
    dense, sparse = fitted_products(rows)
    print(f"DENSE = {dense}\nSPARSE = {sparse}\nCOPY = {fitted_copy()}\n")
    chosen = dict(zip(rows, choices(rows, dense, sparse), strict=True))
    right = sum(is_sparse == (row.speedup > 1) for row, is_sparse in chosen.items())
    ratios = [(dense.seconds(row.sizes) / sparse.seconds(row.sizes), row.speedup) for row in rows]
    print(f"{right} of {len(rows)} choices are right; {off(ratios)}")
    means = {
        "the model": mean_speedup(rows, chosen.__getitem__),
        "the best choice": mean_speedup(rows, lambda row: row.speedup > 1),
        "always sparse": mean_speedup(rows, lambda row: True),
    }
    print(tabulate(means.items(), headers=["chosen by", f"speed-up, {LARGE} tokens and more"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
