"""Calls that stop in their middle: each has a thread of its own, and only one thread runs at a time.

A generator can stop only in its own frame. A model stops here inside a layer, deep in code that knows nothing of it.
"""

import contextvars
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

Stop = TypeVar("Stop")


class _Abandoned(BaseException):
    """The end of a call that is not resumed any more; no `except Exception` of a model catches it."""


class _Call(Generic[Stop]):
    """The state that a paused call and its caller share. `turn` is released for the call, `back` for the caller."""

    def __init__(self) -> None:
        self.turn = threading.Semaphore(0)
        self.back = threading.Semaphore(0)
        self.stops: list[Stop] = []
        self.error: BaseException | None = None
        self.is_abandoned = False

    def run(self, function: Callable[[], object]) -> None:
        self.turn.acquire()
        _here.call = self
        try:
            if not self.is_abandoned:
                function()
        except BaseException as error:  # the caller raises it
            self.error = error
        finally:
            self.back.release()

    def pause(self, stop: Stop) -> None:
        if not self.is_abandoned:
            self.stops.append(stop)
            self.back.release()
            self.turn.acquire()
        if self.is_abandoned:
            raise _Abandoned


class _Here(threading.local):
    call: "_Call[Any] | None" = None


_here = _Here()


def pausing(function: Callable[[], object], kind: type[Stop]) -> Generator[Stop, None, None]:
    """Run a function up to each `pause`, and yield the object, of this kind, that was handed to it.

    The function runs only while the generator is advanced. Its errors are raised there. Closing the generator ends the
    function at the `pause` where it stands. Context variables are the caller's. Thread-local settings of torch
    (autocast, gradients) are not.
    """
    call: _Call[Stop] = _Call()
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(call.run, function), name="nmcompile-paused", daemon=True)
    thread.start()
    try:
        while True:
            call.turn.release()
            call.back.acquire()
            if not call.stops:
                break
            yield call.stops.pop()
    finally:
        call.is_abandoned = True
        call.turn.release()
        thread.join()
    if call.error is not None:
        raise call.error


def pause(stop: object) -> None:
    """Stop the `pausing` function that runs on this thread until it is advanced."""
    if _here.call is None:
        raise RuntimeError("pause is called on a thread that no `pausing` function runs on")
    _here.call.pause(stop)
