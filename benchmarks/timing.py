"""Timing in turns: what slows a shared machine down for a while slows every candidate, so that ratios hold."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Milliseconds of each call by `clock`, which counts seconds; all of them once before any of them again.

    `pause` seconds before each call let the threads of the one before fall asleep: those of two libraries would spin
    against each other.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, repeats):
        for name, call in calls.items():
            if pause:
                time.sleep(pause)
            start = clock()
            call()
            if turn >= 0:
                found[name].append((clock() - start) * 1e3)
    return found


def processor() -> str:
    """The processor's name and flags."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    return "; ".join(dict.fromkeys(names)) or platform.processor()
