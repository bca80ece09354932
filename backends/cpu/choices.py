"""Sparse or dense kernel: a small GEMM runs dense; a larger one is measured with both when it first runs.

Both kernels compute the same product of the same pruned operands, so that a choice never changes the mathematics, only
how sums round. The dense kernel rounds as PyTorch does.
"""

import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from nmcompile.ir.choice import Choice

SMALL = 2**24  # multiplications: about a tenth of a millisecond, in which there is nothing to gain
ROUNDS = 4
MARGIN = 0.98  # of the dense time, that the sparse kernel must stay below
UNFIT = Choice("dense", "the operand keeps more than its pattern: is there a NaN in it?")

_measured: dict[Hashable, Choice] = {}
_latest: dict[str, Choice] = {}


def run_best(
    call: str,
    problem: Hashable,
    multiplications: int,
    predict: Callable[[], float],
    sparse: Callable[[], Tensor | None],
    dense: Callable[[], Tensor],
) -> Tensor:
    """The product by the kernel that pays; `latest(call)` says which it was.

    Args:
        call: the name of the GEMM that asks.
        problem: what decides how long both kernels take; equal problems are measured once in a process.
        multiplications: of the dense product.
        predict: the speed-up, dense time / sparse time, by the cost model.
        sparse, dense: run the kernels. `sparse` gives None where the operand keeps more than its pattern.
    """
    choice = _choice(problem, multiplications, predict, sparse, dense)
    result = sparse() if choice.kernel == "sparse" else None
    if result is None and choice.kernel == "sparse":
        choice = UNFIT
    note(call, choice)
    return dense() if result is None else result


def note(call: str, choice: Choice) -> None:
    """Remember what was chosen for a call."""
    _latest[call] = choice


def latest(call: str) -> Choice | None:
    """What was chosen when that GEMM ran last; None if it never did."""
    return _latest.get(call)


def forget() -> None:
    """Measure again what has been measured: after the machine or its load has changed."""
    _measured.clear()


def _choice(
    problem: Hashable,
    multiplications: int,
    predict: Callable[[], float],
    sparse: Callable[[], Tensor | None],
    dense: Callable[[], Tensor],
) -> Choice:
    if multiplications < SMALL:
        return Choice("dense", f"small, {multiplications / 1e6:.2f} M multiplications")
    if torch.are_deterministic_algorithms_enabled():
        return Choice("sparse", "not measured, so that every run rounds alike: deterministic algorithms are asked for")
    if problem not in _measured:
        if sparse() is None:
            return UNFIT  # what it takes to notice that is no measurement
        _measured[problem] = measure(predict(), sparse, dense)
    return _measured[problem]


def measure(predicted: float, sparse: Callable[[], object], dense: Callable[[], object]) -> Choice:
    """Time both kernels in turn and choose by the best of a few calls each."""
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(1 + ROUNDS):
        times["dense"].append(seconds(dense))
        times["sparse"].append(seconds(sparse))
    best = {kernel: min(values[1:]) for kernel, values in times.items()}
    return Choice(faster(best["sparse"], best["dense"]), "measured", predicted, best["dense"], best["sparse"])


def faster(sparse_seconds: float, dense_seconds: float) -> str:
    """The kernel to run; the dense one unless there is something to gain."""
    return "sparse" if sparse_seconds < MARGIN * dense_seconds else "dense"


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
