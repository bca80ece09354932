"""State that capture must leave unchanged: random states, and every attribute of the modules."""

import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from nmcompile.arguments import Args

Container = list[object] | dict[object, object] | set[object] | deque[object]
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


class PythonStates(NamedTuple):
    """The states of the generators that a trace does not see: Python's, and NumPy's or None."""

    python: Args
    numpy: object


class RandomStates(NamedTuple):
    """The state of every global generator in use; no device has one before CUDA is initialized."""

    torch: Tensor
    python: PythonStates
    cuda: list[Tensor]


def random_states() -> RandomStates:
    """Return the state of every global generator in use: torch's, Python's and NumPy's."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RandomStates(torch.random.get_rng_state(), python_states(), devices)


def python_states() -> PythonStates:
    """Return the states of the generators that a trace does not see: Python's and NumPy's."""
    numpy = sys.modules.get("numpy.random")
    return PythonStates(random.getstate(), None if numpy is None else numpy.get_state())


def restore_random_states(states: RandomStates) -> None:
    """Set the global generators to `states`."""
    torch.random.set_rng_state(states.torch)
    random.setstate(states.python.python)
    if states.cuda:
        torch.cuda.set_rng_state_all(states.cuda)
    if states.python.numpy is not None:
        sys.modules["numpy.random"].set_state(states.python.numpy)


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
        self.kept: dict[int, tuple[Container, Container]] = {}
        self.tensors: dict[int, Tensor] = {}
        for module in root.modules():
            self._keep(module.__dict__, into_objects=True)

    def _keep(self, value: object, into_objects: bool) -> None:
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif _is_container(value):
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

    def changed(self) -> list[Container]:
        """Return the containers that no longer hold the very same objects."""
        return [value for value, copy in self.kept.values() if not _holds_same(value, copy)]

    def restore(self) -> None:
        """Restore the contents of the changed containers."""
        for value in self.changed():
            _refill(value, self.kept[id(value)][1])


def _refill(value: Container, contents: Container) -> None:
    value.clear()
    if isinstance(value, list | deque):
        value.extend(contents)
    elif isinstance(value, set):
        value.update(contents)
    else:
        assert isinstance(contents, dict)
        value.update(contents)


def _is_container(value: object) -> TypeGuard[Container]:
    return type(value) in CONTAINERS


def _is_plain_object(value: object) -> bool:
    """Return whether a value has its own attributes and is neither code nor a module; modules are visited anyway."""
    if isinstance(value, nn.Module | type) or callable(value) or type(value).__module__.startswith("torch."):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _holds_same(value: Container, copy: Container) -> bool:
    if len(value) != len(copy):
        return False
    if isinstance(value, dict) and isinstance(copy, dict):
        return list(value) == list(copy) and all(value[key] is copy[key] for key in copy)
    return value == copy if isinstance(value, set) else all(a is b for a, b in zip(value, copy, strict=True))
