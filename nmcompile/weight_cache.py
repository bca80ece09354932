"""Caches of values that are derived from a weight, while a layer runs without training it.

A layer compares its weight's fingerprint in each such call, so a value is derived again after any write, by any means.
On a GPU a comparison would have to wait for it: there values are cached only for frozen models, which compare nothing.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import starmap
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmcompile.sharded import PLAIN

FROZEN: Final = "frozen"
"""The content of weights whose owner has said that they stand still, see `nmcompile.freeze`."""


Content = int | Literal["frozen"]


_content: ContextVar[Content | None] = ContextVar("_content", default=None)


@contextmanager
def weights_at_rest(content: Content = FROZEN) -> Iterator[None]:
    """Inside, the weight of the layer that runs is at rest, and has this content (its fingerprint)."""
    token = _content.set(content)
    try:
        yield
    finally:
        _content.reset(token)


def content_at_rest() -> Content | None:
    """The content of the weight of the layer that runs; None where it may change."""
    return _content.get()


def are_weights_at_rest() -> bool:
    return _content.get() is not None


Value = TypeVar("Value")

_all: "weakref.WeakSet[Kept[Any]]" = weakref.WeakSet()


def forget(weights: Sequence[Tensor]) -> None:
    """Free everything that is cached of these weights.

    Shards (DTensors) do not say which tensor they are a part of: with one among them, all caches are cleared.
    """
    for kept in [kept for kept in _all if len(kept)]:
        if all(type(weight) in PLAIN for weight in weights):
            for weight in weights:
                kept.forget(weight)
        else:
            kept.clear()


def cached_weights() -> list[Tensor]:
    """Return every weight of which a value is cached."""
    return [weight for kept in list(_all) for weight in kept.weights()]


class _Seen(NamedTuple):
    """What shows that a tensor of ours, such as a mask, is the same and was not written."""

    address: int
    version: int
    strides: tuple[int, ...]

    def is_of(self, x: Tensor) -> bool:
        return self == (x.data_ptr(), x._version, x.stride())


class _Entry(NamedTuple):
    content: Content
    others: tuple[_Seen | None, ...]
    how: Hashable
    value: Any

    def is_of(self, content: Content | None, others: tuple[Tensor | None, ...], how: Hashable) -> bool:
        if content not in (self.content, FROZEN) or self.how != how or len(self.others) != len(others):
            return False
        return all(starmap(_is_same, zip(self.others, others, strict=True)))


class Kept(Generic[Value]):
    """One cached value for each weight, which does not keep the weight alive."""

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()
        _all.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    def weights(self) -> list[Tensor]:
        """Return the weights that have a value."""
        return list(self._entries)

    def get(
        self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable, derive: Callable[[], Value]
    ) -> Value:
        """Return the cached value, or compute it with `derive`; the value must not reference the weight.

        Args:
            weight, others: what the value depends on; see `can_keep`.
            how: what else it depends on.
        """
        entry = self._find(weight, others, how)
        if entry is None:
            content = content_at_rest()
            assert content is not None
            # What is made in inference mode has no version counter.
            with torch.inference_mode(False), torch.no_grad():
                entry = self._entries[weight] = _Entry(content, tuple(map(_seen, others)), how, derive())
        value: Value = entry.value
        return value

    def has(self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable) -> bool:
        """Whether `get` would derive nothing."""
        return self._find(weight, others, how) is not None

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._entries

    def clear(self) -> None:
        self._entries.clear()

    def forget(self, weight: Tensor | None) -> None:
        """Free what is cached of a weight, if anything is."""
        if weight is not None:
            self._entries.pop(weight, None)

    def _find(self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable) -> _Entry | None:
        entry: _Entry | None = self._entries.get(weight)
        return entry if entry is not None and entry.is_of(content_at_rest(), others, how) else None


def can_keep(weight: Tensor, *others: Tensor | None) -> bool:
    """Whether values of a weight may be cached: it is at rest, and not a view, which lives for one call only.

    `others` are tensors of ours, whose writes a version counter shows.
    """
    if torch.compiler.is_compiling() or content_at_rest() is None or type(weight) not in PLAIN or weight._is_view():
        return False
    return all(x is None or (type(x) in PLAIN and not x.is_inference()) for x in others)


def _is_same(seen: _Seen | None, x: Tensor | None) -> bool:
    return x is None if seen is None else x is not None and seen.is_of(x)


def _seen(x: Tensor | None) -> _Seen | None:
    return None if x is None else _Seen(x.data_ptr(), x._version, x.stride())
