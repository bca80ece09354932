"""Full disks and killed processes, at a given step of a write."""

import errno
import os
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
