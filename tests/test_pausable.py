import contextlib
import threading
from collections.abc import Callable

import pytest

from nmcompile.pausable import pause, pausing


def _count(numbers: list[int], log: list[object]) -> Callable[[], None]:
    def run() -> None:
        for number in numbers:
            log.append(number)
            pause(number)
        log.append("end")

    return run


def test_calls_stop_and_go_on_in_turns() -> None:
    log: list[object] = []
    first, second = pausing(_count([1, 2], log), int), pausing(_count([10, 20], log), int)
    assert [next(first), next(second), next(second), next(first)] == [1, 10, 20, 2]
    assert list(first) == list(second) == []
    assert log == [1, 10, 20, 2, "end", "end"]


def test_nothing_runs_before_the_first_advance() -> None:
    log: list[object] = []
    stops = pausing(_count([1], log), int)
    assert log == []
    stops.close()
    assert log == []


def test_an_error_reaches_the_caller() -> None:
    def fails() -> None:
        pause(1)
        raise ValueError("in the model")

    stops = pausing(fails, int)
    assert next(stops) == 1
    with pytest.raises(ValueError, match="in the model"):
        next(stops)


def test_closing_unwinds_the_call_and_ends_its_thread() -> None:
    unwound: list[str] = []

    def runs() -> None:
        try:
            with contextlib.suppress(Exception):
                pause(1)
                unwound.append("never")
        finally:
            unwound.append("finally")

    before = threading.active_count()
    stops = pausing(runs, int)
    next(stops)
    assert threading.active_count() == before + 1
    stops.close()
    assert unwound == ["finally"]
    assert threading.active_count() == before


def test_pause_needs_a_pausing_function() -> None:
    with pytest.raises(RuntimeError, match="pausing"):
        pause(1)
