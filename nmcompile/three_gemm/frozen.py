"""The user's word that the weights of a model stand still, and what takes it back."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nmcompile.weight_cache import cached_weights, forget

_all: "weakref.WeakSet[Frozen]" = weakref.WeakSet()


class Frozen:
    """The word for one model, shared by its layers; a copy of the model does not inherit it.

    Args:
        parameters: of the model, as they are registered.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.holds = True
        self.parameters = frozenset(map(id, parameters))
        _all.add(self)

    def covers(self, weight: Tensor) -> bool:
        """Whether the word is about this tensor: not if `torch.func.functional_call` has put another in its place."""
        return isinstance(weight, nn.Parameter) if torch.compiler.is_compiling() else id(weight) in self.parameters

    def end(self) -> None:
        """Take the word back, and free what it let be cached."""
        if self.holds and not torch.compiler.is_compiling():
            forget([weight for weight in cached_weights() if id(weight) in self.parameters])
        self.holds = False

    def __reduce__(self) -> tuple[Callable[[], "Frozen"], tuple[()]]:
        return _ended, ()


def thaw(parameters: Iterable[Tensor]) -> None:
    """Take the word back for every model that holds one of these parameters."""
    frozen = [one for one in _all if one.holds]
    changed = frozenset(map(id, parameters)) if frozen else frozenset()
    for one in frozen:
        if one.parameters & changed:
            one.end()


def _ended() -> Frozen:
    copied = Frozen()
    copied.end()
    return copied
