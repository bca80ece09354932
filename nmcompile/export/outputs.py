"""Tensors that a model returns, which are the outputs of its file, and their names."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

CONSTANTS = (bool, int, float, complex, str, bytes)
PAST, PRESENT = "past_key_values", "present"
"""A field of Hugging Face's results, and the name that Optimum gives to it as an output."""

Keys = tuple[str | int, ...]


def outputs_of(result: object) -> list[object]:
    """Return the tensors and constants in a model's result of any structure, without other objects.

    Hugging Face's caches are opened: the keys and values of each layer are tensors of the result.
    """
    return [leaf for _, leaf in _leaves(result, ()) if isinstance(leaf, (Tensor, *CONSTANTS))]


def output_names(result: object) -> list[str]:
    """Return the names of `outputs_of` that Optimum gives: `logits`, `present.0.key`; "" for results by position."""
    return [_name(keys) for keys, leaf in _leaves(result, ()) if isinstance(leaf, (Tensor, *CONSTANTS))]


def left_out(result: object) -> list[str]:
    """Return what `outputs_of` leaves out, by place and class."""
    others = ((keys, leaf) for keys, leaf in _leaves(result, ()) if not isinstance(leaf, (Tensor, *CONSTANTS)))
    return [f"{_place(keys) or 'the result'} ({type(leaf).__name__})" for keys, leaf in others if leaf is not None]


def _name(keys: Keys) -> str:
    if not keys or not isinstance(keys[0], str):
        return ""
    first = PRESENT if keys[0] == PAST else keys[0]
    return ".".join((first, *map(str, keys[1:])))


def _place(keys: Keys) -> str:
    return "".join(f"[{key!r}]" for key in keys)


def _leaves(value: object, keys: Keys) -> Iterator[tuple[Keys, object]]:
    """Yield the leaves with their places; structures that torch's pytree does not know are opened too."""
    for path, leaf in pytree.tree_flatten_with_path(value, is_leaf=lambda one: _in_cache(one) is not None)[0]:
        place = (*keys, *map(_key, path))
        inside = _inside(leaf)
        if inside is None:
            yield place, leaf
        else:
            yield from _leaves(inside, place)


def _key(key: Any) -> str | int:
    """Return the key of a mapping, the name of a field, or a position."""
    found = next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))
    return found if isinstance(found, int) else str(found)


def _inside(leaf: object) -> object:
    """Return the items of a mapping, a list, a cache or a dataclass unknown to pytree; None for a leaf."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if isinstance(leaf, list | tuple):
        return list(leaf)
    if (inside := _in_cache(leaf)) is not None:
        return inside
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {one.name: getattr(leaf, one.name) for one in fields(leaf)}
    return None


def _in_cache(leaf: Any) -> dict[str, object] | None:
    """Return the layers of a growing cache of Hugging Face's, by number; None for any other object."""
    caches = sys.modules.get("transformers.cache_utils")
    if caches is None:
        return None
    if type(leaf) is caches.DynamicCache:
        layers = [{"key": layer.keys, "value": layer.values} for layer in leaf.layers if layer.is_initialized]
        return {str(number): layer for number, layer in enumerate(layers)}
    if type(leaf) is caches.EncoderDecoderCache:
        halves = {"decoder": _in_cache(leaf.self_attention_cache), "encoder": _in_cache(leaf.cross_attention_cache)}
        if all(half is not None for half in halves.values()):
            numbers = dict.fromkeys(number for half in halves.values() for number in half or {})
            return {n: {name: half[n] for name, half in halves.items() if half and n in half} for n in numbers}
    return None
