"""Which of the library's algorithms to take.

Some are wrong for some shapes, and the default is often not the fastest: each is checked against the dense product
before it is timed, once for each problem.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nmcompile.backends.choices import seconds
from nmcompile.backends.cusparselt.library import Algorithm, Plan, Problem, algorithm_count, stream_of
from nmcompile.errors import LibraryError

SPLITS = (1, -1, 2, 4)  # parts of the sum that are computed side by side; -1 leaves it to the library (Hopper)
TOLERANCE = 4  # relative error of the whole product, in steps of the dtype
ROUNDS = 3
Operands = tuple[Tensor, Tensor, Tensor | None, int]
"""What a plan runs on: the compressed and the dense matrix, the bias, and the stream."""

_found: dict[tuple[Problem, bool], Algorithm | None] = {}


def best_algorithm(
    problem: Problem, compressed: Tensor, dense: Tensor, bias: Tensor | None, expected: Callable[[], Tensor]
) -> Algorithm | None:
    """The fastest algorithm that is right, searched once; None if none is, or while a graph is captured.

    Where algorithms have to be deterministic it is the first that is right.
    """
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    key = problem, is_deterministic
    if key not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        operands = compressed, dense, bias, stream_of(problem.device)
        right = _right_algorithms(problem, operands, expected())
        if is_deterministic:  # no clock decides
            _found[key] = next(right, None)
        else:
            times = {one: _time(partial(Plan(problem, one).run, *operands), problem) for one in right}
            _found[key] = min(times, key=lambda one: times[one]) if times else None
    return _found[key]


def forget_algorithms() -> None:
    """Search again for every problem."""
    _found.clear()


def _right_algorithms(problem: Problem, operands: Operands, expected: Tensor) -> Iterator[Algorithm]:
    limit = TOLERANCE * torch.finfo(problem.dtype).eps * float(expected.float().norm())
    for number in range(algorithm_count(problem)):
        for split_k in SPLITS:
            algorithm = Algorithm(number, split_k)
            try:
                result = Plan(problem, algorithm).run(*operands)
            except LibraryError:  # not for this problem
                continue
            if float((result.float() - expected.float()).norm()) <= limit:  # false for a NaN
                yield algorithm


def _time(run: Callable[[], Tensor], problem: Problem) -> float:
    return min(seconds(run, problem.device) for _ in range(1 + ROUNDS))
