"""Timing in turns: whatever slows a shared machine for a while slows every candidate, so ratios hold."""

import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

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


def gpu_setting() -> dict[str, Any]:
    """Return the name of the GPU and the versions of its libraries."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "cusparselt": CUSPARSELT.version() if CUSPARSELT.support().ok else None,
    }


def processor() -> str:
    """Return the name and the flags of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    return "; ".join(dict.fromkeys(names)) or platform.processor()
