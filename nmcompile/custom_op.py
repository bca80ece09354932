"""Custom operators of torch, each with one signature."""

from collections.abc import Callable, Iterable
from inspect import Signature, signature
from typing import ParamSpec, TypeVar, cast

import torch
from torch._ops import OpOverload

P = ParamSpec("P")
R = TypeVar("R")


def custom_op(
    name: str, fake: Callable[..., object] | None = None, mutates_args: Iterable[str] = ()
) -> Callable[[Callable[P, R]], "OpOverload[P, R]"]:
    """Make a function an operator that `torch.compile` calls as it is. The name then stands for its default overload.

    Args:
        name: `"namespace::name"`.
        fake: returns empty tensors like those that the function returns. It takes the function's parameters that it
            names, and no others. None for a function that returns nothing.
        mutates_args: the parameters that the function writes.
    """

    def register(function: Callable[P, R]) -> "OpOverload[P, R]":
        definition = torch.library.custom_op(name, function, mutates_args=mutates_args)
        if fake is not None:
            definition.register_fake(_taking_all(signature(function), fake))
        namespace, _, base = name.partition("::")
        return cast("OpOverload[P, R]", getattr(getattr(torch.ops, namespace), base).default)

    return register


def _taking_all(whole: Signature, fake: Callable[..., object]) -> Callable[..., object]:
    """Return a function of the whole signature, which calls `fake` with the parameters that it names."""
    names = signature(fake).parameters

    def call(*args: object, **kwargs: object) -> object:
        given = whole.bind(*args, **kwargs)
        given.apply_defaults()
        return fake(**{name: given.arguments[name] for name in names})

    return call
