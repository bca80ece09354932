"""Tensors that a model returns, which are the outputs of its file."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

CONSTANTS = (bool, int, float, complex, str, bytes)


def outputs_of(result: object) -> list[object]:
    """Return the tensors and constants in a model's result of any structure, without caches and other objects."""
    return [leaf for _, leaf in _leaves(result, "") if isinstance(leaf, (Tensor, *CONSTANTS))]


def left_out(result: object) -> list[str]:
    """Return what `outputs_of` leaves out, by place and class."""
    others = ((path, leaf) for path, leaf in _leaves(result, "") if not isinstance(leaf, (Tensor, *CONSTANTS)))
    return [f"{path or 'the result'} ({type(leaf).__name__})" for path, leaf in others if leaf is not None]


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield the leaves with their places; structures that torch's pytree does not know are opened too."""
    for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
        place = path + pytree.keystr(keys)
        inside = _inside(leaf)
        if inside is None:
            yield place, leaf
        else:
            yield from _leaves(inside, place)


def _inside(leaf: object) -> object:
    """Return the items of a mapping, a list or a dataclass unknown to pytree; None for a leaf."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if isinstance(leaf, list | tuple):
        return list(leaf)
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {one.name: getattr(leaf, one.name) for one in fields(leaf)}
    return None
