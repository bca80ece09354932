"""The calls into PyTorch's operators for cuSPARSELt, and which of its algorithms to take.

Some algorithms are wrong for some shapes, and the default is often not the fastest: each is checked against the dense
product before it is timed, once for each shape.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nmcompile.backends.choices import seconds

ALGORITHMS = 64  # an upper bound: the library's own count is not known for every version
SPLITS = (1, 2, 4)  # parts of the sum that are computed side by side
TOLERANCE = 4  # relative error of the whole product, in steps of the dtype
ROUNDS = 3


class Algorithm(NamedTuple):
    """One of the library's kernels."""

    id: int
    split_k: int


_found: dict[Hashable, Algorithm | None] = {}


def compress(matrix: Tensor) -> Tensor:
    """The values and places of a contiguous matrix that keeps at most two of every four elements of a row."""
    return torch._cslt_compress(matrix)


def multiply(compressed: Tensor, dense: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    """`dense @ sparse.T + bias`, `(lanes, depth)` and `(rows, depth)` to `(lanes, rows)`."""
    return torch._cslt_sparse_mm(
        compressed, dense.t(), bias, transpose_result=True, alg_id=algorithm.id, split_k=algorithm.split_k
    )


def best_algorithm(
    compressed: Tensor, dense: Tensor, bias: Tensor | None, expected: Callable[[], Tensor]
) -> Algorithm | None:
    """The fastest algorithm that is right, searched once for each shape; None if none is, or while a graph is captured.

    Where algorithms have to be deterministic it is the first that is right.
    """
    shapes = tuple(compressed.shape), tuple(dense.shape), dense.stride()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    problem = *shapes, dense.dtype, bias is None, dense.device, is_deterministic
    if problem not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        right = _right_algorithms(compressed, dense, bias, expected())
        if is_deterministic:  # no clock decides
            _found[problem] = next(right, None)
        else:
            times = {one: _time(partial(multiply, compressed, dense, bias, one)) for one in right}
            _found[problem] = min(times, key=lambda one: times[one]) if times else None
    return _found[problem]


def forget_algorithms() -> None:
    """Search again for every shape."""
    _found.clear()


def _right_algorithms(compressed: Tensor, dense: Tensor, bias: Tensor | None, expected: Tensor) -> Iterator[Algorithm]:
    limit = TOLERANCE * torch.finfo(dense.dtype).eps * float(expected.float().norm())
    for number in range(ALGORITHMS):
        for split_k in SPLITS:
            algorithm = Algorithm(number, split_k)
            try:
                result = multiply(compressed, dense, bias, algorithm)
            except RuntimeError:  # not for this shape, or no such algorithm
                continue
            if float((result.float() - expected.float()).norm()) <= limit:  # false for a NaN
                yield algorithm


def _time(run: Callable[[], object]) -> float:
    return min(seconds(run) for _ in range(1 + ROUNDS))
