"""Slots in which nodes keep the kernel that they ran last.

A torch operator takes no Python object and returns tensors only, also if `torch.compile` has inlined the graph. So an
operator gets the name of its node's slot, and finds the slot by that name. Only the node holds the slot, so both are
freed with the graph.
"""

import itertools
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

from nmcompile.ir.choice import Choice

Result = TypeVar("Result")

_numbers = itertools.count()
_slots: "WeakValueDictionary[str, ChoiceSlot]" = WeakValueDictionary()


class Ready(Protocol):
    """A node of a frozen layer as a function of the layer's input; it puts the input on its grid itself."""

    def run(self, input: Tensor, slot: "ChoiceSlot") -> Tensor | None:
        """Return the layer's output, and keep the choice in the slot; None if the graph has to run."""


class ChoiceSlot:
    """The latest choice of one node; None before its operator first runs.

    Args:
        label: the readable part of the slot's name, such as the layer and its phase.
        latest: the choice to start with.

    `is_settled` says that an equal call would run the dense kernel again, whatever the values of its operands. `ready`
    is what the operator has made of the operands of its latest call, if they are frozen; with `prunes` it also prunes
    the layer's input, as the graph does before its node: of each eight codes the four largest stay.
    """

    def __init__(self, label: str, latest: Choice | None = None) -> None:
        self.label = label
        self.latest = latest
        self.is_settled = False
        self.ready: Ready | None = None
        self.prunes = False
        self.name = f"{label} {next(_numbers)}"
        _slots[self.name] = self

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"ready": None}


def find_slot(name: str) -> ChoiceSlot | None:
    """Return the slot of that name, if its graph is still alive."""
    return _slots.get(name)


def keep(name: str, outcome: tuple[Result, Choice], is_settled: bool = False) -> Result:
    """Keep a choice in the slot of that name, if its graph is still alive, and return the result."""
    result, choice = outcome
    if (slot := find_slot(name)) is not None:
        slot.latest, slot.is_settled = choice, is_settled
    return result


_settlements = [0]


def settlement() -> int:
    """Return a number that changes whenever settled choices have to be made again."""
    return _settlements[0]


def unsettle() -> None:
    """Have every settled choice made again."""
    _settlements[0] += 1
