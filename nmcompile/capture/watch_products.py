"""Weights that Python code multiplies by, watched in a run of the example.

Code that no trace covers (loops over experts, branches on data) or that reads the weight of a layer instead of calling
it can still run as layers, if all that it does with a weight is to multiply by it.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmcompile.arguments import Args, Kwargs
from nmcompile.capture.regions import is_metadata
from nmcompile.capture.state import Memory, contents_unchanged
from nmcompile.ir.weight_products import Function, Part, part_of, products


@dataclass
class Watched:
    """How a run used the weights that it was asked to watch.

    Args:
        products: by name of the parameter and of the module whose code it is, the parts that products read, each with
            whether a bias was added.
        others: by name of the parameter, another function that read its elements.
        has_run: whether the model took the example.
    """

    products: dict[tuple[str, str], set[tuple[Part, bool]]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    has_run: bool = False

    def readers(self, parameter: str) -> list[str]:
        """Return the modules that multiply by a parameter."""
        return [reader for name, reader in self.products if name == parameter]


def watch_products(
    model: nn.Module, names: Mapping[int, str], own: Set[tuple[str, int]], args: Args, kwargs: Mapping[str, object]
) -> Watched:
    """Run the example in eval() and in train() and return how code outside of the layers used some parameters.

    Args:
        model: the model; nothing of it is changed.
        names: the parameters to watch, by id.
        own: the modules, with the ids of parameters, whose code runs as layers already.
        args, kwargs: the example; a mode in which the model does not take it tells nothing.
    """
    found, modes = Watched(), {module: module.training for module in model.modules()}
    try:
        for training in (False, True):
            for module in modes:
                module.training = training  # an own train() may merge weights
            with suppress(Exception):
                _run(model, _Watch(names, own, found), args, kwargs)
                found.has_run = True
    except _Writes:
        return Watched()
    finally:
        for module, training in modes.items():
            module.training = training
    return found if found.has_run else Watched()


class _Writes(BaseException):
    """A run is about to write a parameter; code that catches every `Exception` lets it pass."""


def _run(model: nn.Module, watch: "_Watch", args: Args, kwargs: Mapping[str, object]) -> None:
    hooks = [hook for name, module in model.named_modules() for hook in _follow(module, name, watch.running)]
    try:
        with contents_unchanged(Memory(model)), torch.no_grad(), watch:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _follow(module: nn.Module, name: str, running: list[str]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Keep the names of the modules that run in `running`, the innermost last."""

    def enter(*_: object) -> None:
        running.append(name)

    def leave(*_: object) -> None:
        running.pop()

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)


class _Watch(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str], own: Set[tuple[str, int]], found: Watched) -> None:
        super().__init__()
        self.names = names
        self.own = own
        self.found = found
        self.running: list[str] = []

    def __torch_function__(
        self, function: Function, types: Sequence[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if args and isinstance(args[0], nn.Parameter) and _is_in_place(function):
            raise _Writes
        result = function(*args, **(kwargs or {}))
        reader = self.running[-1] if self.running else ""
        for tensor in _tensors((args, kwargs)):
            parameter = next((one for one in (tensor, tensor._base) if id(one) in self.names), None)
            if parameter is not None and (reader, id(parameter)) not in self.own:
                self._note(parameter, reader, function, args, kwargs or {}, result)
        return result

    def _weights(self, operands: object, biases: Sequence[Tensor]) -> int:
        """Return how many operands but biases are watched weights: a product of two is no layer."""
        others = [one for one in _tensors(operands) if all(one is not bias for bias in biases)]
        return sum(id(one) in self.names or id(one._base) in self.names for one in others)

    def _note(
        self, parameter: Tensor, reader: str, function: Function, args: Args, kwargs: Kwargs, result: object
    ) -> None:
        name, called = self.names[id(parameter)], getattr(function, "__name__", str(function))
        found = products(function, args, kwargs)
        biases = [product.bias for product in found if product.bias is not None]
        parts = [(part_of(parameter, product), product.bias is not None) for product in found]
        uses = {(part, has_bias) for part, has_bias in parts if part is not None}
        if uses and self._weights((args, kwargs), biases) == 1:
            self.found.products.setdefault((name, reader), set()).update(uses)
        elif called == "detach" or not (_shares(result, parameter) or is_metadata(called)):
            self.found.others.setdefault(name, called)


def _is_in_place(function: Function) -> bool:
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _shares(result: object, parameter: Tensor) -> bool:
    """Return whether a result holds no other elements than the parameter's own: a view, or no tensor at all."""
    return all(tensor is parameter or tensor._base is parameter for tensor in _tensors(result))
