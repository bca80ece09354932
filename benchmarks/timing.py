"""Timing in turns: what slows a shared machine down for a while slows every candidate, so that ratios hold."""

import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nmcompile.backends.cusparselt.library import library_loads, library_version

HEAD_START = 4_000_000  # of a call over the GPU, in its cycles: about two milliseconds
CACHE = 2**28  # bytes: more than any cache holds


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Milliseconds of each call by `clock`, which counts seconds; all of them once before any of them again.

    Each turn has another order: what one leaves in caches and in the allocator, the next finds.
    `pause` seconds before each call let the threads of the one before fall asleep: those of two libraries would spin
    against each other.
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
    """Milliseconds for which each call keeps the GPU busy; all of them once before any of them again.

    The GPU waits for `head_start` cycles before each, in which its work is asked for, and nothing is left in its cache.
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
    """The GPU and the versions of what runs on it."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(),
        "cusparselt": library_version() if library_loads() else None,
    }


def processor() -> str:
    """The processor's name and flags."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    return "; ".join(dict.fromkeys(names)) or platform.processor()
