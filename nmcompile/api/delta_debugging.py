"""Delta debugging (Zeller & Hildebrandt 2002): the smallest change that makes the difference, by few trials."""

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import TypeVar

Unit = TypeVar("Unit", bound=Hashable)


def minimal(units: Sequence[Unit], holds: Callable[[frozenset[Unit]], bool]) -> tuple[Unit, ...]:
    """Return units for which `holds`, none of which can be left out.

    Trials are remembered. With one unit that matters among n they are about 2 log₂ n; at worst their number grows
    with n².

    Args:
        units: for all of which it holds.
        holds: tells for some of the units.
    """
    known: dict[frozenset[Unit], bool] = {frozenset(units): True}

    def tried(some: Sequence[Unit]) -> bool:
        key = frozenset(some)
        if key not in known:
            known[key] = holds(key)
        return known[key]

    current, parts = list(units), 2
    while current:
        if tried(()):
            return ()
        smaller = _smaller(_split(current, min(parts, len(current))), tried)
        if smaller is not None:
            current, is_part = smaller
            parts = 2 if is_part else max(parts - 1, 2)
        elif parts < len(current):
            parts = min(2 * parts, len(current))
        else:
            break
    return tuple(current)


def _smaller(parts: Sequence[list[Unit]], tried: Callable[[Sequence[Unit]], bool]) -> tuple[list[Unit], bool] | None:
    """Return a part for which it holds, or all without a part; and whether it is a part. None if there is none."""
    for part in parts if len(parts) > 1 else ():
        if tried(part):
            return part, True
    for left in range(len(parts) if len(parts) > 2 else 0):
        rest = [unit for place, part in enumerate(parts) for unit in part if place != left]
        if tried(rest):
            return rest, False
    return None


def _split(units: list[Unit], count: int) -> list[list[Unit]]:
    """Return consecutive parts of about equal size."""
    ends = [len(units) * place // count for place in range(count + 1)]
    return [units[start:end] for start, end in pairwise(ends)]
