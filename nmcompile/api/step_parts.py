"""Where the time of a step goes: its GEMMs, the pruning, the masks, other operators, and Python with the dispatcher.

PyTorch's profiler tells the time inside operators. The time of a step that no operator accounts for is Python's and the
dispatcher's, measured without the profiler, which would slow them down.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

GEMMS = ("linear", "conv", "gemm", "::mm", "::addmm", "_scaled_mm", "_int_mm", "cslt_sparse_mm")
PRUNING = ("prune", "next_keys", "triton_pack", "transposable", "to_grid", "fake_quantize")
MASKS = ("nmcompile::refresh_mask", "nmcompile::mask")
"""Parts of operators' names. An operator counts where the innermost of those around it that has such a name does."""
VIEWS = re.compile(
    "aten::(view|as_strided|t|transpose|permute|reshape|expand|unsqueeze|squeeze|select|slice|narrow|chunk|split|"
    "unflatten|flatten|detach|alias|empty|empty_like|empty_strided|new_empty|result_type|to|lift_fresh)"
)
"""Operators that compute nothing: their time is the dispatcher's."""

PROFILES = 3


class Parts(NamedTuple):
    """Seconds of a step by what they are spent on.

    Args:
        gemm: products with weights, with the pruning that a kernel does in the same pass.
        pruning: pruning and quantization of operands, and the drawing of random numbers for it.
        masks: masks, made or applied.
        others: all other operators: norms, activations, attention, the optimizer.
        python: the time that no operator accounts for.
    """

    gemm: float
    pruning: float
    masks: float
    others: float
    python: float

    @property
    def total(self) -> float:
        """Return the time of the step."""
        return sum(self)


def step_parts(
    steps: Mapping[str, Callable[[], object]], seconds: Mapping[str, float], count: int, on_gpu: bool
) -> dict[str, Parts]:
    """Return the parts of each step, whose times without a profiler are `seconds`, by profiles of `count` steps.

    On a GPU they are those of the time for which it runs kernels, and `python` is the time for which it waits. Steps
    are profiled in turns, and of each the profile with the least time counts: other programs only add to it.
    """
    profiles: dict[str, list[Mapping[str, float]]] = {name: [] for name in steps}
    for _ in range(PROFILES):
        for name, step in steps.items():
            profiles[name].append(profiled(step, seconds[name], count, on_gpu))
    return {name: _parts(min(found, key=_total), seconds[name]) for name, found in profiles.items()}


def _total(times: Mapping[str, float]) -> float:
    return sum(times.values())


def _parts(times: Mapping[str, float], seconds: float) -> Parts:
    """Return the parts of a step; the profiler's own time may make short operators add up to more than the step."""
    scale = min(1.0, seconds / max(_total(times), 1e-12))
    kernels = {part: spent * scale for part, spent in times.items()}
    return Parts(**kernels, python=max(0.0, seconds - _total(kernels)))


def profiled(step: Callable[[], object], seconds: float, count: int, on_gpu: bool) -> Mapping[str, float]:
    """Return the seconds of a step in the kernels of each part, as the mean of `count` steps.

    What a step takes longer than `seconds`, its time without the profiler, is the profiler's, about the same for each
    operator on the CPU; it is taken off.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
    events = found.events() or ()
    own = 0.0 if on_gpu else max(0.0, taken - count * seconds) / max(1, len(events))
    return {part: spent / count for part, spent in kernel_times(events, on_gpu, own).items()}


def kernel_times(events: Sequence[FunctionEvent], on_gpu: bool, own: float = 0.0) -> Mapping[str, float]:
    """Return the seconds that operators spend in kernels, by their part; `own` are the profiler's in each of them."""
    times = dict.fromkeys(("gemm", "pruning", "masks", "others"), 0.0)
    for event in events:
        part = part_of(event)
        if part is not None:
            spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
            times[part] += max(0.0, spent - own)
    return times


def part_of(event: FunctionEvent) -> str | None:
    """Return the part that an event's own time belongs to; None for Python and for operators that compute nothing."""
    if "::" not in event.name or event.name.startswith("autograd::") or VIEWS.fullmatch(event.name):
        return None
    parts = list[str]()
    around: FunctionEvent | None = event
    while around is not None:
        if (part := _known(around.name)) is not None:
            parts.append(part)
        around = around.cpu_parent
    if "masks" in parts:
        return "masks"
    return parts[0] if parts else "others"


def _known(name: str) -> str | None:
    """Return the part that an operator's name tells; a GEMM that prunes while it packs its operand is a GEMM."""
    if name in MASKS:
        return "masks"
    if "::" not in name:
        return None
    if any(word in name for word in GEMMS):
        return "gemm"
    return "pruning" if any(word in name for word in PRUNING) else None
