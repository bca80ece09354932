"""The pace of samples: as many as take a given share of the time at most."""

import statistics
from collections import deque

WARM_UP = 10  # steps whose times are known before the first sample
LATEST = 50  # steps whose median is the usual time


class Pace:
    """The times of steps, and whether the next one may be sampled.

    A sample costs what its step takes longer than usual. The first one is expected to cost as much as a step, later
    ones as much as the dearest so far.

    Args:
        share: of the time of all steps, which all samples may take.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.usual: deque[float] = deque(maxlen=LATEST)
        self.total = 0.0
        self.spent = 0.0
        self.dearest: float | None = None

    def note(self, seconds: float, is_sampled: bool) -> None:
        """Note the time of a step."""
        self.total += seconds
        if is_sampled:
            extra = max(0.0, seconds - statistics.median(self.usual))
            self.spent += extra
            self.dearest = max(self.dearest or 0.0, extra)
        else:
            self.usual.append(seconds)

    @property
    def is_due(self) -> bool:
        """Return whether a sample of the next step stays within the share."""
        if len(self.usual) < WARM_UP:
            return False
        expected = statistics.median(self.usual) if self.dearest is None else self.dearest
        return self.spent + expected <= self.share * self.total
