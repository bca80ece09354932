"""Means, spreads and paired intervals of a few runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """The mean difference of paired runs, and the half width of its interval (`None` for a single pair)."""

    mean: float
    half_width: float | None

    @property
    def is_clear(self) -> bool:
        """Return whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        interval = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:+.2f}{interval}{'' if self.is_clear else ' (not clear)'}"


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; `None` for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def paired_difference(
    values: Sequence[float], reference: Sequence[float], confidence: float = CONFIDENCE
) -> Difference:
    """Return values - reference with Student's interval; values[i] and reference[i] share a seed and its batches."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    deviation = spread(differences)
    if deviation is None:
        return Difference(fmean(differences), None)
    count = len(differences)
    return Difference(fmean(differences), student_quantile(confidence, count - 1) * deviation / math.sqrt(count))


def seeds_for(deviation: float, half_width: float, confidence: float = CONFIDENCE) -> int:
    """Return how many paired runs an interval of that half width takes, if differences deviate as given."""
    enough = (
        count
        for count in range(2, MOST_SEEDS)
        if student_quantile(confidence, count - 1) * deviation <= half_width * math.sqrt(count)
    )
    return next(enough, MOST_SEEDS)


def student_quantile(confidence: float, freedom: int) -> float:
    """Return the t with P(|T| < t) = confidence, T of Student's distribution with `freedom` degrees of freedom.

    With t = sqrt(freedom) tan(angle) the probability is a finite sum in the angle, which bisection inverts.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(angle)): Abramowitz and Stegun, equations 26.7.3 and 26.7.4."""
    is_odd = freedom % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
