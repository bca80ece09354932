"""Weights that Python code multiplies by, watched in a run of the example.

Code that no trace covers (loops over experts, branches on data) or that reads the weight of a layer instead of calling
it can still run as layers, if all that it does with a weight is to multiply by it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from nmcompile.arguments import Args, Kwargs, copies_of, tensors_in
from nmcompile.capture.state import Memory, contents_unchanged
from nmcompile.capture.watch_calls import CHECKPOINT
from nmcompile.capture.write_guard import WriteGuard
from nmcompile.ir.element_reads import LIKE_SECOND, is_metadata
from nmcompile.ir.storage_key import storage_key
from nmcompile.ir.weight_products import COMPOSED, Function, Part, Product, part_of, products

OUTSIDE = "outside of the model's forward"
MODULE_CALL = nn.Module._call_impl.__code__
CASTS = {"to", "float", "double", "half", "bfloat16", "type_as", "detach"}


@dataclass
class Watched:
    """How a run used the weights that it was asked to watch.

    Args:
        products: by name of the parameter and of the module whose code it is, the parts that products read, each with
            whether a bias was added.
        others: by name of the parameter, another function that read its elements.
        composed: the modules whose code calls functions of `COMPOSED`.
        has_run: whether the model took the example.
    """

    products: dict[tuple[str, str], set[tuple[Part, bool]]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    composed: set[str] = field(default_factory=set)
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
    """Run copies of the example, with gradients on: they are off only inside code that computes its own."""
    hooks = [hook for name, module in model.named_modules() for hook in _follow(module, name, watch.running)]
    args, kwargs = copies_of(args, kwargs)
    guard = WriteGuard(frozenset(map(storage_key, model.parameters())), _Writes())
    try:
        nothing_saved = saved_tensors_hooks(_forget, _forget)
        with contents_unchanged(Memory(model)), torch.enable_grad(), nothing_saved, guard, watch:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _forget(saved: Tensor) -> Tensor:
    """Keep nothing for a backward pass, which never comes."""
    return saved.new_empty(0)


def _follow(module: nn.Module, name: str, running: list[str]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Keep the names of the modules that run in `running`, the innermost last."""

    def enter(*_: object) -> None:
        running.append(name)

    def leave(*_: object) -> None:
        running.pop()

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, prepend=True, always_call=True)  # before hooks of others


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
        reader = self.running[-1] if self.running else OUTSIDE
        if opened := COMPOSED.get(function):
            self.found.composed.add(reader)
            with self:
                return opened(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs)):
            parameter = next((one for one in (tensor, tensor._base) if id(one) in self.names), None)
            if parameter is not None and (reader, id(parameter)) not in self.own:
                self._note(parameter, reader, function, args, kwargs or {}, result)
        return result

    def _note(
        self, parameter: Tensor, reader: str, function: Function, args: Args, kwargs: Kwargs, result: object
    ) -> None:
        name, called = self.names[id(parameter)], getattr(function, "__name__", str(function))
        found = products(function, args, kwargs)
        parts = [(part_of(parameter, product), product.bias is not None) for product in found]
        uses = {(part, has_bias) for part, has_bias in parts if part is not None}
        is_routable = reader != OUTSIDE and torch.is_grad_enabled() and not _is_run_again()
        if uses and is_routable and self._weights((args, kwargs), found) == 1:
            self.found.products.setdefault((name, reader), set()).update(uses)
        elif _reads(called, args, parameter, result):
            self.found.others.setdefault(name, called)

    def _weights(self, operands: object, found: Sequence[Product]) -> int:
        """Return how many operands but biases are watched weights: a product of two is no layer."""
        biases = [product.bias for product in found]
        others = [one for one in tensors_in(operands) if all(one is not bias for bias in biases)]
        return sum(id(one) in self.names or id(one._base) in self.names for one in others)


def _is_run_again() -> bool:
    """Return whether code checkpoints activations by itself: backward runs it again, outside of any router."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not MODULE_CALL:
        if frame.f_code is CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _reads(called: str, args: Args, parameter: Tensor, result: object) -> bool:
    """Return whether an operator takes elements of a parameter, and not only its type, its shape or a view of it.

    A cast counts, even to the type that the parameter has: after another cast of the model it would make a new tensor.
    """
    if is_metadata(called):
        return False
    is_second = called in LIKE_SECOND and args[:1] != () and args[0] is not parameter
    is_view = all(one is parameter or one._base is parameter for one in tensors_in(result))
    return not is_second and (called in CASTS or not is_view)
