"""Choice among the library's algorithms.

Some are wrong for some shapes, and the default is often not the fastest. So each is checked against the dense product
of random operands before it is timed, once for each problem. The sparse operand is compressed as a layer's is, so that
a wrong guess about its format shows here too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.backends.cusparselt.library import Library
from nmcompile.backends.cusparselt.operand import Operand, checked_layout, compressed
from nmcompile.backends.cusparselt.plans import Algorithm, Plan, Problem, algorithm_count
from nmcompile.backends.cusparselt.support import SPARSE_MULTIPLE
from nmcompile.backends.shared.recent import Recent
from nmcompile.backends.shared.timing import seconds
from nmcompile.errors import LibraryError

SPLITS = (1, -1, 2, 4)  # parts of the sum that are computed side by side; -1 leaves it to the library (Hopper)
TOLERANCE = 4  # relative error of the whole product, in steps of the dtype
ROUNDS = 3
SEARCHES = 4096  # cached results of searches

_found: Recent[tuple[Library, Problem, bool], tuple[Algorithm | None]] = Recent(SEARCHES)


class Trial(NamedTuple):
    """Random operands of a problem, and their product."""

    sparse: Tensor
    dense: Tensor
    bias: Tensor | None
    expected: Tensor


def best_algorithm(library: Library, problem: Problem) -> Algorithm | None:
    """Return the fastest correct algorithm, searched once; None if there is none, or while a graph is captured.

    If algorithms have to be deterministic, it is the first correct one.
    """
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    key = library, problem, is_deterministic
    found = _found.get(key)
    if found is None:
        if library.is_capturing(problem.device):
            return None
        try:
            found = (_search(library, problem, is_deterministic),)
        except (LibraryError, torch.OutOfMemoryError):  # it refuses the device or the problem, or finds no room
            found = (None,)
        _found.put(key, found)
    return found[0]


def _search(library: Library, problem: Problem, is_deterministic: bool) -> Algorithm | None:
    if problem.depth % SPARSE_MULTIPLE and not _has_layout(library, problem):
        return None  # the library's own compression would cost more than the padding that such a depth saves
    trial = _trial(library, problem)
    right = _right_algorithms(library, problem, trial)
    if is_deterministic:  # no clock decides
        return next(right, None)
    times = {one: _time(partial(_run, Plan(library, problem, one), trial), problem) for one in right}
    return min(times, key=lambda one: times[one]) if times else None


def _has_layout(library: Library, problem: Problem) -> bool:
    return checked_layout(library, problem.rows, problem.depth, problem.dtype, problem.device) is not None


def _trial(library: Library, problem: Problem) -> Trial:
    dice = torch.Generator(problem.device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=dice, device=problem.device, dtype=problem.dtype)

    with torch.inference_mode(False), torch.no_grad():
        weight = Operand(random(problem.rows, problem.depth), 1, operator="greedy")
        dense = random(problem.lanes, problem.depth)
        bias = random(problem.rows) if problem.has_bias else None
        expected = F.linear(dense, weight.pruned(), bias)
        sparse = compressed(library, weight, problem.rows, problem.depth)
    by_depth, by_rows = problem.by_depth, problem.by_rows
    return Trial(sparse, dense.t().contiguous() if by_depth else dense, bias, expected.t() if by_rows else expected)


def _right_algorithms(library: Library, problem: Problem, trial: Trial) -> Iterator[Algorithm]:
    limit = TOLERANCE * torch.finfo(problem.dtype).eps * float(trial.expected.float().norm())
    for number in range(algorithm_count(library, problem)):
        for split_k in SPLITS:
            algorithm = Algorithm(number, split_k)
            try:
                result = _run(Plan(library, problem, algorithm), trial)
            except LibraryError:  # not for this problem
                continue
            if float((result.float() - trial.expected.float()).norm()) <= limit:  # false for a NaN
                yield algorithm


def _run(plan: Plan, trial: Trial) -> Tensor:
    return plan.run(trial.sparse, trial.dense, trial.bias)


def _time(run: Callable[[], Tensor], problem: Problem) -> float:
    return min(seconds(run, problem.device) for _ in range(1 + ROUNDS))
