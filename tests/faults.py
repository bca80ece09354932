"""Full disks and killed processes, at a given step of a write."""

import errno
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

import pytest

CALLS = ("mkdir", "open", "fsync", "chmod", "replace", "unlink")  # functions of os, in any order


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(patch: pytest.MonkeyPatch, step: int, fault: Callable[[], object] = full_disk) -> None:
    """Make the fault happen at the call of that number."""
    _count(patch, [], step, fault)


def steps_of(write: Callable[[], object]) -> int:
    """Return the number of calls at which a fault can happen."""
    with pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []
        _count(patch, calls, -1, full_disk)
        write()
    return len(calls)


def killed_at(step: int, write: Callable[[], object]) -> bool:
    """Run a write in a child process, kill it at the call of that number, and return whether that was reached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads: the child only writes files
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs ends
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            write()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def _count(patch: pytest.MonkeyPatch, calls: list[str], step: int, fault: Callable[[], object]) -> None:
    def counted(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == step + 1:
                fault()
            return call(*args, **kwargs)

        return run

    for name in CALLS:
        patch.setattr(os, name, counted(name))
