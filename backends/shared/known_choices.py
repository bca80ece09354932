"""Decided problems: measured in this process, or loaded from a file. All nodes and models share them."""

from collections.abc import Hashable, Mapping

from nmcompile.backends.shared.recent import Recent
from nmcompile.ir.choice import Choice

PROBLEMS = 4096  # cached measurements, about a kilobyte each

_measured: Recent[Hashable, Choice] = Recent(PROBLEMS)
_loaded: dict[str, Choice] = {}
"""Loaded choices by the `repr` of their problems, as in files; their number is that in the loaded files."""


def known_choice(problem: Hashable) -> Choice | None:
    """Return the choice that was measured or loaded for an equal problem; None if there is none."""
    choice = _measured.get(problem)
    if choice is None and _loaded and (choice := _loaded.get(repr(problem))) is not None:
        _measured.put(problem, choice)  # the next call finds it without the text
    return choice


def remember(problem: Hashable, choice: Choice) -> None:
    """Record a measured choice for all equal problems."""
    _measured.put(problem, choice)


def known_choices() -> dict[str, Choice]:
    """Return every known choice by the `repr` of its problem."""
    return _loaded | {repr(problem): choice for problem, choice in _measured.items()}


def take_over(choices: Mapping[str, Choice]) -> None:
    """Add choices by the `repr` of their problems."""
    _loaded.update(choices)


def forget() -> None:
    """Forget all choices, so problems are measured again: after the machine or its load has changed."""
    _measured.clear()
    _loaded.clear()
