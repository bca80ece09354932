"""Timing of calls on the CPU or on a CUDA device, alone and in turns."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

HEAD_START = 2_000_000  # cycles by which a call is ahead of the GPU: about a millisecond

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], object]


def seconds(run: Call, device: torch.device | None = None, head_start: int = HEAD_START) -> float:
    """Return the seconds that one call takes; on a CUDA device, the seconds for which it keeps the device busy.

    There a call only enqueues the work, which a model does ahead of time. The device first waits for `head_start`
    cycles, which excludes the enqueueing from the time.
    """
    if device is None or device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(head_start)
        start_event.record()
        run()
        end_event.record()
        end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) / 1e3


class Turns(NamedTuple):
    """The number of turns in which calls are timed: from `least` to `most`, as many as fit into `budget` seconds."""

    least: int
    most: int
    budget: float


def medians_in_turns(calls: Mapping[Name, Call], clock: Callable[[Call], float], turns: Turns) -> dict[Name, float]:
    """Return the median time of each call by `clock`; all calls run once before any runs again.

    The first turn is not timed: it chooses kernels and makes masks. Each turn has another order, because a call finds
    the caches and the allocator as the one before left them.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, dice, spent, turn = list(calls), random.Random(0), 0.0, 0
    while turn <= turns.least or (turn <= turns.most and spent < turns.budget):
        dice.shuffle(order)
        for name in order:
            taken = clock(calls[name])
            if turn:
                times[name].append(taken)
                spent += taken
        turn += 1
    return {name: statistics.median(found) for name, found in times.items()}
