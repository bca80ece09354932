"""Decisions from measured times, which have to be the same on all ranks."""

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from nmcompile.errors import PassError

Decision = TypeVar("Decision")


def is_distributed() -> bool:
    """Return whether this process is one of several ranks."""
    return distributed.is_available() and distributed.is_initialized()


def of_first_rank(measure: Callable[[], Decision]) -> Decision:
    """Return the first rank's result on all ranks; the others do not measure.

    Raises:
        PassError: on another rank, that the first one failed.
    """
    if not is_distributed():
        return measure()
    failure: Exception | None = None
    found: list[tuple[Decision | None, str]] = [(None, "")]
    if distributed.get_rank() == 0:
        try:
            found = [(measure(), "")]
        except Exception as error:  # the other ranks wait, and have to be told
            failure, found = error, [(None, f"{type(error).__name__}: {error}")]
    distributed.broadcast_object_list(found, src=0)
    ((decision, complaint),) = found
    if failure is not None:
        raise failure
    if decision is None:
        raise PassError(f"the first rank, which measures for all what pays (where='pays'), failed with {complaint}")
    return decision


def by_all_ranks(measure: Callable[[], Decision]) -> Decision:
    """Let every rank measure, as a model may communicate in its steps, and return the first one's result on all.

    Raises:
        PassError: some rank failed.
    """
    if not is_distributed():
        return measure()
    result: tuple[Decision | None, str]
    try:
        result = measure(), ""
    except Exception as error:  # told to the other ranks first
        result = None, f"{type(error).__name__}: {error}"
    results: list[tuple[Decision | None, str]] = [result] * distributed.get_world_size()
    distributed.all_gather_object(results, result)
    complaint = next((complaint for _, complaint in results if complaint), "")
    decision = results[0][0]
    if complaint or decision is None:
        raise PassError(complaint)
    return decision
