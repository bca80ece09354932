"""The types of a call's arguments, whatever the function is, and the tensors in them."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

Args = tuple[object, ...]
"""Positional arguments, such as the example inputs of a model."""
Kwargs = Mapping[str, object]
"""Arguments by name."""


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results: in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, one.name) for one in fields(value)])


def copies_of(args: Args, kwargs: Kwargs) -> tuple[Args, dict[str, object]]:
    """Return the arguments with copies of their tensors: a model may write into its inputs."""
    copied: tuple[Args, dict[str, object]] = pytree.tree_map_only(
        Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), (args, dict(kwargs))
    )
    return copied
