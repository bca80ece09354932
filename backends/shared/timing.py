"""Timing of a call on the CPU or on a CUDA device."""

import time
from collections.abc import Callable

import torch

HEAD_START = 2_000_000  # cycles by which a call is ahead of the GPU: about a millisecond


def seconds(run: Callable[[], object], device: torch.device | None = None, head_start: int = HEAD_START) -> float:
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
