"""Where a torch model runs each layer, to change or to record what flows through it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where torch runs a layer: in a module of its own, or under a role of a module that runs several."""

    module: nn.Module
    role: str = ""

    def follow(self, take_over: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Pass the layer's input through `take_over`; the returned function undoes it."""
        if hasattr(self.module, "three_gemms"):
            return self._around(lambda triple, x, *rest: triple(take_over(x), *rest))
        hook = self.module.register_forward_pre_hook(lambda _, args: (take_over(args[0]), *args[1:]), prepend=True)
        return hook.remove

    def watch(self, see: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
        """Show `see` the input and output of every call of a rewritten layer; the returned function undoes it."""

        def seen(triple: Any, x: Tensor, *rest: Any) -> Any:
            result = triple(x, *rest)
            see(x, result)
            return result

        return self._around(seen)

    def _around(self, call: Callable[..., Any]) -> Callable[[], None]:
        triples: Any = self.module.three_gemms
        triple = triples[self.role]
        triples[self.role] = _Followed(triple, call)
        return partial(triples.__setitem__, self.role, triple)


class _Followed:
    """A triple that is called through a function."""

    def __init__(self, triple: Any, call: Callable[..., Any]) -> None:
        self._triple, self._call = triple, call

    def __call__(self, *args: Any) -> Any:
        return self._call(self._triple, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._triple, name)


def places_of(model: nn.Module) -> dict[str, Place]:
    """Where a model runs its layers, by their names."""
    places = {}
    for name, module in model.named_modules():
        triples = getattr(module, "three_gemms", None)
        if triples is not None:
            places.update({triple.layer.name: Place(module, role) for role, triple in triples.items()})
        elif hasattr(module, "weight"):
            places.setdefault(name, Place(module))
    return places
