"""Statistics of a few runs, against SciPy."""

import numpy as np
import pytest
from scipy import stats

from nmcompile.paper.statistics import Difference, paired_difference, seeds_for, spread, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_student_quantile(freedom: int, confidence: float) -> None:
    expected = stats.t.ppf((1 + confidence) / 2, freedom)
    assert student_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_is_that_of_the_paired_t_test() -> None:
    values, reference = np.random.default_rng(0).normal(size=(2, 5))
    found = paired_difference(list(values), list(reference))
    expected = stats.ttest_rel(values, reference).confidence_interval(0.95)
    assert found.half_width is not None
    low, high = found.mean - found.half_width, found.mean + found.half_width
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert spread(list(values)) == pytest.approx(np.std(values, ddof=1))


def test_one_run_has_no_spread() -> None:
    found = paired_difference([3.0], [1.0])
    assert (found.mean, found.half_width, found.is_clear, spread([3.0])) == (2.0, None, False, None)


def test_intervals_are_clear_if_they_leave_out_zero() -> None:
    assert paired_difference([2.0, 2.1, 2.2], [1.0, 1.0, 1.0]).is_clear
    assert not paired_difference([2.0, 0.1, 1.2], [1.0, 1.0, 1.0]).is_clear


def test_differences_say_whether_they_are_clear() -> None:
    shown = [str(Difference(mean, 0.5)) for mean in (1.0, -0.25)]
    assert shown == ["+1.00 ± 0.50", "-0.25 ± 0.50 (not clear)"]


@pytest.mark.parametrize(("deviation", "half_width"), [(0.3, 0.2), (0.1, 0.2), (1.0, 0.2)])
def test_seeds_for_is_the_least_number(deviation: float, half_width: float) -> None:
    def width(count: int) -> float:
        return float(stats.t.ppf(0.975, count - 1) * deviation / np.sqrt(count))

    count = seeds_for(deviation, half_width)
    assert width(count) <= half_width and (count == 2 or width(count - 1) > half_width)
