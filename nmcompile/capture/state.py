"""State that capture must leave unchanged: random states, and every attribute of the modules."""

import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, OrderedDict, defaultdict, set, deque)


@contextmanager
def unchanged(model: nn.Module) -> Iterator["Memory"]:
    """Undo all changes to random states and to the model's attributes at the end, also after an error."""
    drawn, memory = random_states(), Memory(model)
    try:
        yield memory
    finally:
        memory.restore()
        restore_random_states(drawn)


def random_states() -> dict[str, Any]:
    """Return the state of every global generator in use: torch's, Python's and NumPy's."""
    states: dict[str, Any] = {"torch": torch.random.get_rng_state(), **python_states()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def python_states() -> dict[str, Any]:
    """Return the states of the generators that a trace does not see: Python's and NumPy's."""
    states: dict[str, Any] = {"python": random.getstate()}
    if numpy := sys.modules.get("numpy.random"):
        states["numpy"] = numpy.get_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the global generators to `states`."""
    torch.random.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy.random"].set_state(states["numpy"])


@contextmanager
def contents_unchanged(memory: "Memory") -> Iterator[None]:
    """Undo all writes to tensors that are not parameters at the end, also after an error."""
    states = [one for one in memory.tensors.values() if not isinstance(one, nn.Parameter) and one.device.type != "meta"]
    copies = [tensor.detach().clone() for tensor in states]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, contents in zip(states, copies, strict=True):
                if not torch.equal(tensor, contents):
                    tensor.copy_(contents)


class Memory:
    """The attributes of a module tree, with the contents of plain containers and of plain objects in them.

    Tensors are remembered by identity, not by value.
    """

    def __init__(self, root: nn.Module) -> None:
        self.kept: dict[int, tuple[Any, Any]] = {}
        self.tensors: dict[int, Tensor] = {}
        for module in root.modules():
            self._keep(module.__dict__, into_objects=True)

    def _keep(self, value: Any, into_objects: bool) -> None:
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif type(value) in CONTAINERS:
            if id(value) not in self.kept:
                self.kept[id(value)] = (value, value.copy())
                for item in value.values() if isinstance(value, dict) else value:
                    self._keep(item, into_objects)
        elif type(value) is tuple:
            for item in value:
                self._keep(item, into_objects)
        elif into_objects and _is_plain_object(value):
            # Go no deeper: the objects of an object (a trainer, a process group) can reach the whole program.
            self._keep(value.__dict__, into_objects=False)

    def changed(self) -> list[Any]:
        """Return the containers that no longer hold the very same objects."""
        return [value for value, copy in self.kept.values() if not _holds_same(value, copy)]

    def restore(self) -> None:
        """Restore the contents of the changed containers."""
        for value in self.changed():
            copy = self.kept[id(value)][1]
            value.clear()
            value.extend(copy) if isinstance(value, list | deque) else value.update(copy)


def _is_plain_object(value: Any) -> bool:
    """Return whether a value has its own attributes and is neither code nor a module; modules are visited anyway."""
    if isinstance(value, nn.Module | type) or callable(value) or type(value).__module__.startswith("torch."):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _holds_same(value: Any, copy: Any) -> bool:
    if len(value) != len(copy):
        return False
    if isinstance(value, dict):
        return list(value) == list(copy) and all(value[key] is copy[key] for key in copy)
    return value == copy if isinstance(value, set) else all(a is b for a, b in zip(value, copy, strict=True))
