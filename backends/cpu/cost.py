"""The cost model: how much faster the sparse kernel is than the dense one, from the size of the product.

    dense   rows · depth · lanes · m + rows · depth · r
    sparse  rows · depth · lanes · m' · waste + rows · depth · p + depth · lanes · c · tasks

with the costs of this machine, measured once: m and m' for a multiplication, r to read an element of the weight, p to
pack one, c to copy an element of the dense operand into a panel, once for every task over some of the rows. `waste`
accounts for the unused part of a tile's vectors, and for the writing of code.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cpu.gemm import VECTOR, Geometry, sparse_forward
from nmcompile.backends.shared.timing import seconds

ROWS_OF_A_TASK = 1024
TILE_VECTORS = 64  # of the AVX-512 kernel; the measured costs absorb the narrower vectors of others
SAMPLES = (
    (512, 512, 512),
    (2048, 512, 16),
    (16, 512, 2048),
)  # rows, depth and lanes; each makes another term the largest


class Costs(NamedTuple):
    """Seconds for each multiplication and for each element that is read, packed or copied."""

    linear: float
    convolution: float
    read: float
    sparse: float
    pack: float
    copy: float


def predicted_speedup(rows: int, depth: int, lanes: int, is_linear: bool, threads: int) -> float:
    """Predict dense time / sparse time of one product on this machine."""
    costs, sizes = costs_here(threads), (rows, depth, lanes)
    return dense_seconds(costs, *sizes, is_linear) / sparse_seconds(costs, *sizes, is_packed=False)


def dense_seconds(costs: Costs, rows: int, depth: int, lanes: int, is_linear: bool) -> float:
    """Return the time of the dense kernel."""
    products, weights = dense_terms(rows, depth, lanes)
    return products * (costs.linear if is_linear else costs.convolution) + weights * costs.read


def sparse_seconds(costs: Costs, rows: int, depth: int, lanes: int, is_packed: bool) -> float:
    """Return the time of the sparse kernel, on an operand that is packed before the call or by it."""
    products, packed, copied = sparse_terms(rows, depth, lanes)
    return products * costs.sparse + (0 if is_packed else packed * costs.pack) + copied * costs.copy


def dense_terms(rows: int, depth: int, lanes: int) -> tuple[int, int]:
    """Return how many multiplications and how many reads of the weight the dense kernel takes."""
    return rows * depth * lanes, rows * depth


def sparse_terms(rows: int, depth: int, lanes: int) -> tuple[int, int, int]:
    """Return how often the sparse kernel multiplies a vector, and how many elements it packs and copies."""
    vectors = -(-lanes // VECTOR)
    tiles = -(-vectors // TILE_VECTORS)
    # The code of a value is written, or the value and its place loaded, once for all vectors of a tile.
    return rows * depth * (vectors + 2 * tiles), rows * depth, depth * lanes * -(-rows // ROWS_OF_A_TASK)


@functools.cache
def costs_here(threads: int) -> Costs:
    """Measure the costs of this machine, once for each number of threads."""
    operands = [(_ones(lanes, depth), _ones(rows, depth)) for rows, depth, lanes in SAMPLES]
    for _, weight in operands:
        weight.unflatten(1, (-1, 4))[..., 2:] = 0
    dense = [_best(functools.partial(F.linear, x, weight)) for x, weight in operands[:2]]
    sparse = [_best(functools.partial(_sparse, x, weight)) for x, weight in operands]
    image, kernel = _ones(1, 128, 28, 28), _ones(128, 128, 3, 3)
    convolution = _best(functools.partial(F.conv2d, image, kernel, padding=1)) / (28**2 * kernel.numel())
    multiply, read = _solved([dense_terms(*sample) for sample in SAMPLES[:2]], dense)
    return Costs(multiply, convolution, read, *_solved([sparse_terms(*sample) for sample in SAMPLES], sparse))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cpu")


def _sparse(x: Tensor, weight: Tensor) -> bool:
    return sparse_forward(x, weight, None, None, x.new_empty(x.shape[0], weight.shape[0]), Geometry())


def _solved(terms: list[tuple[int, ...]], times: list[float]) -> list[float]:
    """Return the cost of each term; noise may make a small one negative."""
    costs = torch.linalg.solve(torch.tensor(terms, dtype=torch.float64), torch.tensor(times, dtype=torch.float64))
    solved: list[float] = costs.clamp(min=0).tolist()
    return solved


def _best(run: Callable[[], object]) -> float:
    return min(seconds(run) for _ in range(12))  # others may run at the same time
