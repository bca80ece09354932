"""Timing in turns: whatever slows a shared machine for a while slows every candidate, so ratios hold."""

import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nmcompile.backends.cusparselt.library import CUSPARSELT

HEAD_START = 4_000_000  # GPU cycles, about two milliseconds, in which a call is queued
CACHE = 2**28  # bytes, more than any cache holds


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Return the milliseconds of each call by `clock`, which counts seconds. All calls run once before any runs again.

    The order changes with each turn, because a call finds caches and the allocator as the one before left them.
    `pause` seconds before each call let the threads of the one before fall asleep; those of two libraries would
    otherwise spin against each other.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, dice = list(calls), random.Random(0)
    for turn in range(-warmup, repeats):
        dice.shuffle(order)
        for name in order:
            if pause:
                time.sleep(pause)
            start = clock()
            calls[name]()
            if turn >= 0:
                found[name].append((clock() - start) * 1e3)
    return found


def on_gpu(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 3, head_start: int = HEAD_START
) -> dict[str, list[float]]:
    """Return the milliseconds for which each call keeps the GPU busy. All calls run once before any runs again.

    Before each call the GPU's cache is cleared, and the GPU waits for `head_start` cycles, in which the work is queued.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    spoiler = torch.empty(CACHE, dtype=torch.uint8, device="cuda")
    for turn in range(-warmup, repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            spoiler.zero_()
            if head_start:
                torch.cuda._sleep(head_start)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 0:
                found[name].append(start.elapsed_time(end))
    return found


def busy_on_gpu(call: Callable[[], object]) -> float:
    """Return the milliseconds in which the GPU runs kernels or copies of a call, by PyTorch's profiler."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    on_device = (event for event in found.events() or () if event.device_type == DeviceType.CUDA)
    spans = (event.time_range for event in on_device if not event.is_user_annotation)  # such a span includes gaps
    return covered((span.start, span.end) for span in spans) / 1e3


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def gpu_setting() -> dict[str, Any]:
    """Return the name of the GPU and the versions of its libraries."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "cusparselt": CUSPARSELT.version() if CUSPARSELT.support().ok else None,
    }


def cpu_setting() -> dict[str, Any]:
    """Return the processor, the threads and the version of PyTorch."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": processor()}


def processor() -> str:
    """Return the name, the numbers and the flags of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return "{model name} (family {cpu family}, model {model}); {flags}".format_map(fields)
