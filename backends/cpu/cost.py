"""The cost model: how much faster the sparse kernel is than the dense one, from the size of the product.

    dense   rows · depth · lanes · d
    sparse  rows · depth · lanes · m · waste  +  rows · depth · p  +  depth · lanes · c · (rows / rows of a task)

with what this machine takes, measured once: d and m for a multiplication, p to pack an element of the sparse operand,
c to copy one of the dense operand into a panel. `waste` is what the tiles' width leaves unused.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nmcompile.backends.cpu.choices import seconds
from nmcompile.backends.cpu.gemm import Geometry, sparse_forward

ROWS_OF_A_TASK = 1024
TILE_VECTORS, VECTOR = 8, 16
SAMPLES = (512, 512, 512), (2048, 512, 16), (16, 512, 2048)  # rows, depth and lanes: a term of each is the largest


class Costs(NamedTuple):
    """Seconds for each multiplication of the dense kernels and of the sparse one, and for each element moved."""

    linear: float
    convolution: float
    multiply: float
    pack: float
    copy: float


def predicted_speedup(rows: int, depth: int, lanes: int, is_linear: bool, threads: int) -> float:
    """Dense time / sparse time of one product."""
    costs = _costs(threads)
    dense = rows * depth * lanes * (costs.linear if is_linear else costs.convolution)
    terms = _terms(rows, depth, lanes)
    return dense / sum(term * cost for term, cost in zip(terms, costs[2:], strict=True))


def _terms(rows: int, depth: int, lanes: int) -> tuple[float, float, float]:
    vectors = -(-lanes // VECTOR)
    tiles = -(-vectors // TILE_VECTORS)
    # Each value is loaded once for all vectors of a tile, with its place.
    loads = vectors + 2 * tiles
    return rows * depth * VECTOR * loads, rows * depth, depth * lanes * -(-rows // ROWS_OF_A_TASK)


@functools.cache
def _costs(threads: int) -> Costs:
    times = []
    for rows, depth, lanes in SAMPLES:
        x, weight = torch.ones(lanes, depth), torch.ones(rows, depth)
        weight.view(rows, -1, 4)[..., 2:] = 0
        times.append(
            _best(functools.partial(sparse_forward, x, weight, None, None, torch.empty(lanes, rows), Geometry()))
        )
    terms = torch.tensor([_terms(*sample) for sample in SAMPLES], dtype=torch.float64)
    multiply, pack, copy = torch.linalg.solve(terms, torch.tensor(times, dtype=torch.float64)).clamp(min=0).tolist()
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    image, kernel = torch.ones(1, 128, 28, 28), torch.ones(128, 128, 3, 3)
    linear = _best(functools.partial(F.linear, x, weight)) / 512**3
    convolution = _best(functools.partial(F.conv2d, image, kernel, padding=1)) / (28**2 * kernel.numel())
    return Costs(linear, convolution, multiply, pack, copy)


def _best(run: Callable[[], object]) -> float:
    return min(seconds(run) for _ in range(4))
