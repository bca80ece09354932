"""Choice of the sparse or the dense kernel: a small GEMM runs dense, a larger one is timed with both at first use.

Both kernels compute the same product of the same pruned operands, so a choice never changes the mathematics, only how
sums round. The dense kernel rounds as PyTorch does. On CPUs it also runs if an operand holds a NaN or an infinity, so a
choice never hides one. On GPUs that check would have to wait for the device. There cuSPARSELt skips pruned elements: a
NaN reaches the results of the kept elements that meet it, but with the dense kernel all results.

On a GPU random operands are timed instead of the call's own, for the gradients of a first step may all be zero, and a
GPU multiplies zeros faster. The sparse kernel also has to gain what its launch costs on the host.

Equal problems are measured once per process, or again if another program seems to have disturbed the measurement.
"""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from nmcompile.backends.shared.known_choices import is_due, known_choice, remember
from nmcompile.backends.shared.timing import seconds
from nmcompile.ir.choice import MEASURED, TOO_FEW, Choice

SMALL = 2**24  # multiplications: about a tenth of a millisecond on a CPU, too little to gain anything
SMALL_ON_GPU = 2**33  # about a fortieth of a millisecond on a large GPU
LAUNCH = 15e-6  # seconds by which a sparse call from eager Python takes longer on the host than a dense one
ROUNDS = 4
SPREAD = 1.3  # × the best time, within which a second one lies unless something disturbed the calls
MARGIN = 0.95  # × the dense time, which the sparse kernel must stay below: runs differ by some percent
UNFIT = Choice("dense", "no sparse kernel computes it: a NaN or an infinity, no right algorithm, or no room to try one")
CAPTURING = Choice("dense", "nothing can be measured while a CUDA graph is captured; call it once before")
TOO_LITTLE = f"a gain of less than the {LAUNCH * 1e6:.0f} µs that a sparse call costs on the host"

Result = TypeVar("Result")


class Trial(NamedTuple):
    """A product that is timed in place of a call's on a GPU.

    Args:
        device: the device of the call.
        kernels: makes random operands, and returns the sparse and the dense kernel on them.
    """

    device: torch.device
    kernels: Callable[[], tuple[Callable[[], object], Callable[[], object]]]


def run_best(
    problem: Callable[[], Hashable],
    multiplications: int,
    predict: Callable[[], float | None],
    sparse: Callable[[], Result | None],
    dense: Callable[[], Result],
    trial: Trial | None = None,
) -> tuple[Result, Choice]:
    """Return the product by the kernel that pays, and the choice of that kernel.

    Args:
        problem: returns everything that decides the time of both kernels; equal ones (by `repr`, for files) are
            measured once. Small products are not asked for it, as that would take longer than some of them.
        multiplications: of the dense product.
        predict: the speed-up, dense time / sparse time, by the cost model, if there is one.
        sparse, dense: run the kernels. `sparse` returns None if the operand keeps more than its pattern.
        trial: for kernels of a GPU; those of the CPU are timed on the call's own operands.
    """
    choice = _choice(problem, multiplications, predict, sparse, dense, trial)
    if choice.kernel == "sparse":
        result = sparse()
        if result is not None:
            return result, choice
        choice = UNFIT
    return dense(), choice


def _choice(
    problem: Callable[[], Hashable],
    multiplications: int,
    predict: Callable[[], float | None],
    sparse: Callable[[], object],
    dense: Callable[[], object],
    trial: Trial | None,
) -> Choice:
    if is_small(multiplications, on_gpu=trial is not None):
        return small(multiplications)
    if torch.are_deterministic_algorithms_enabled():
        return Choice("sparse", "not measured, so every run rounds alike: deterministic algorithms are requested")
    asked = problem()
    choice = known_choice(asked)
    if choice is None or is_due(asked):
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return choice or CAPTURING
        try:
            if trial is not None:
                sparse, dense = trial.kernels()
            if sparse() is None:
                return UNFIT  # the time to notice that is not a measurement
            choice, is_sure = measure(predict(), sparse, dense, trial)
        except torch.OutOfMemoryError:  # each attempt would empty the allocator's cache
            choice, is_sure = UNFIT, True
        remember(asked, choice, is_sure)
    return choice


def is_small(multiplications: int, on_gpu: bool) -> bool:
    """Return whether a product of so few multiplications runs dense in any case."""
    return multiplications < (SMALL_ON_GPU if on_gpu else SMALL)


@lru_cache(1024)
def small(multiplications: int) -> Choice:
    """Return the choice for a product of few multiplications."""
    return Choice("dense", f"{TOO_FEW}, {multiplications / 1e6:.2f} M multiplications")


def measure(
    predicted: float | None, sparse: Callable[[], object], dense: Callable[[], object], trial: Trial | None
) -> tuple[Choice, bool]:
    """Time both kernels in turn, choose by the best of a few calls each, and return whether these are beyond doubt."""
    device = None if trial is None else trial.device
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(1 + ROUNDS):
        times["dense"].append(seconds(dense, device))
        times["sparse"].append(seconds(sparse, device))
    best = {kernel: sorted(values[1:]) for kernel, values in times.items()}
    (dense_time, next_dense), (sparse_time, next_sparse) = best["dense"][:2], best["sparse"][:2]
    kernel, reason = faster(sparse_time, dense_time, on_gpu=trial is not None)
    is_sure = next_dense <= SPREAD * dense_time and next_sparse <= SPREAD * sparse_time
    return Choice(kernel, reason, predicted, dense_time, sparse_time), is_sure


def faster(sparse_seconds: float, dense_seconds: float, on_gpu: bool) -> tuple[str, str]:
    """Return the kernel to run, the dense one unless the sparse one gains enough, and the reason."""
    if sparse_seconds >= MARGIN * dense_seconds:
        return "dense", MEASURED
    if on_gpu and dense_seconds - sparse_seconds < LAUNCH:
        return "dense", TOO_LITTLE
    return "sparse", MEASURED
