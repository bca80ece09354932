"""Decided problems: measured in this process, or loaded from a file. All nodes and models share them.

A measurement that another program seems to have disturbed is doubted: the problem is measured again some calls later,
and a second time if need be.
"""

from collections.abc import Hashable, Mapping

from nmcompile.backends.shared.recent import Recent
from nmcompile.ir.choice import Choice
from nmcompile.ir.choice_slot import unsettle

PROBLEMS = 4096  # cached measurements, about a kilobyte each
DOUBTED_CALLS = 50  # by a doubted choice, until it is measured again: ten calls, so they add little
MEASUREMENTS = 3  # of one problem, at most: some machines are never quiet

_measured: Recent[Hashable, Choice] = Recent(PROBLEMS)
_doubts: Recent[Hashable, "_Doubt"] = Recent(PROBLEMS)
_loaded: dict[str, Choice] = {}
"""Loaded choices by the `repr` of their problems, as in files; their number is that in the loaded files."""


class _Doubt:
    """A count of the measurements of a problem, and of the calls since the last one."""

    def __init__(self) -> None:
        self.measurements = 0
        self.calls = 0

    def is_open(self) -> bool:
        """Return whether the problem may be measured again."""
        return self.measurements < MEASUREMENTS

    def is_due(self) -> bool:
        """Count a call, and return whether the problem is to be measured again."""
        self.calls += 1
        return self.calls > DOUBTED_CALLS and self.is_open()


def known_choice(problem: Hashable) -> Choice | None:
    """Return the choice that was measured or loaded for an equal problem; None if there is none."""
    choice = _measured.get(problem)
    if choice is None and _loaded and (choice := _loaded.get(repr(problem))) is not None:
        _measured.put(problem, choice)  # the next call finds it without the text
    return choice


def is_due(problem: Hashable) -> bool:
    """Count a call by a known choice, and return whether its problem is to be measured again."""
    doubt = _doubts.get(problem) if len(_doubts) else None
    return doubt is not None and doubt.is_due()


def is_doubted(choice: Choice) -> bool:
    """Return whether a measured choice may still change."""
    open_problems = [problem for problem, doubt in _doubts.items() if doubt.is_open()]
    return any(_measured.get(problem) is choice for problem in open_problems)


def remember(problem: Hashable, choice: Choice, is_sure: bool) -> None:
    """Record a measured choice for all equal problems; an unsure one is measured again later."""
    _measured.put(problem, choice)
    if is_sure:
        _doubts.drop(problem)
        return
    doubt = _doubts.get(problem) or _Doubt()
    doubt.measurements, doubt.calls = doubt.measurements + 1, 0
    _doubts.put(problem, doubt)


def known_choices() -> dict[str, Choice]:
    """Return every known choice by the `repr` of its problem."""
    return _loaded | {repr(problem): choice for problem, choice in _measured.items()}


def take_over(choices: Mapping[str, Choice]) -> None:
    """Add choices by the `repr` of their problems."""
    unsettle()
    _loaded.update(choices)


def forget() -> None:
    """Forget all choices, so problems are measured again: after the machine or its load has changed."""
    unsettle()
    _measured.clear()
    _doubts.clear()
    _loaded.clear()
