"""A call in a process of its own, with limits on its time and memory: a crash is a result and not the end."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")
CONTEXT = multiprocessing.get_context("forkserver")
"""The server imports the libraries once, with `CONTEXT.set_forkserver_preload`; each process is a fork of it."""


class Lost(Exception):
    """The process ended without a result; the message says how."""


def isolated(function: Callable[..., T], *args: object, seconds: float, bytes: int) -> T:
    """Return `function(*args)`, called in a process of its own.

    Args:
        function: can be pickled, as can its arguments and its result.
        seconds: after this time the process is killed.
        bytes: of address space that the process may take.

    Raises:
        Lost: the call raised, crashed, or reached a limit.
    """
    receiving, sending = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_call, args=(sending, bytes, function, args), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(seconds):
            raise Lost(f"it ran for more than {seconds:g} s")
        is_result, result = receiving.recv()
    except EOFError:
        process.join()
        raise Lost(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiving.close()
    if not is_result:
        raise Lost(result)
    return result  # type: ignore[no-any-return]


def _call(sending: Connection, bytes: int, function: Callable[..., object], args: tuple[object, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (bytes, bytes))
    try:
        outcome = (True, function(*args))
    except BaseException as error:
        outcome = (False, f"{type(error).__name__}: {error}")
    sending.send(outcome)
