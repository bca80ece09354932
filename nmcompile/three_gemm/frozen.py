"""The user's promise that the weights of a model do not change, and the events that end it."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nmcompile.weight_cache import cached_weights, forget

_all: "weakref.WeakSet[Frozen]" = weakref.WeakSet()


class Frozen:
    """The promise for one model, shared by its layers; a copy of the model does not inherit it.

    Args:
        parameters: the model's parameters, as they are registered.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.holds = True
        self.parameters = frozenset(map(id, parameters))
        _all.add(self)

    def covers(self, weight: Tensor) -> bool:
        """Return whether the promise covers this tensor; `torch.func.functional_call` may have replaced the weight."""
        return isinstance(weight, nn.Parameter) if torch.compiler.is_compiling() else id(weight) in self.parameters

    def end(self) -> None:
        """End the promise, and free the values that were cached under it."""
        if self.holds and not torch.compiler.is_compiling():
            forget([weight for weight in cached_weights() if id(weight) in self.parameters])
        self.holds = False

    def __reduce__(self) -> tuple[Callable[[], "Frozen"], tuple[()]]:
        return _ended, ()


def thaw(parameters: Iterable[Tensor]) -> None:
    """End the promise of every model that holds one of these parameters."""
    frozen = [one for one in _all if one.holds]
    changed = frozenset(map(id, parameters)) if frozen else frozenset()
    for one in frozen:
        if one.parameters & changed:
            one.end()


def _ended() -> Frozen:
    copied = Frozen()
    copied.end()
    return copied
