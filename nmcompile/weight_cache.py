"""Caches of values computed from a weight, for layers that run without training it.

In each such call a layer compares its weight's fingerprint, so a value is recomputed after any write, by any means. On
a GPU the comparison would have to wait for the device, so values are cached there only for frozen models, which compare
nothing.
"""

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from itertools import starmap
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmcompile.sharded import PLAIN

FROZEN: Final = "frozen"
"""Content of weights whose owner promises not to change them, see `nmcompile.freeze`."""


Content = int | Literal["frozen"]


_content: ContextVar[Content | None] = ContextVar("_content", default=None)


class weights_at_rest:
    """A context in which the weight of the running layer does not change; `content` is its fingerprint."""

    def __init__(self, content: Content = FROZEN) -> None:
        self.content = content

    def __enter__(self) -> None:
        self.token = _content.set(self.content)

    def __exit__(self, *error: object) -> None:
        _content.reset(self.token)


content_at_rest: Callable[[], Content | None] = _content.get
"""Return the content of the running layer's weight; None if the weight may change."""


def are_weights_at_rest() -> bool:
    return _content.get() is not None


Value = TypeVar("Value")

_cached: Any = WeakTensorKeyDictionary()
"""For each weight, its entry in each cache. One table, since each call that trains a weight looks it up."""


def forget(weights: Sequence[Tensor]) -> None:
    """Free everything that is cached for these weights.

    A shard (DTensor) does not tell which tensor it is a part of, so a single one clears all caches.
    """
    if not _cached.data:
        return
    if all(type(weight) in PLAIN for weight in weights):
        for weight in weights:
            _cached.pop(weight, None)
    else:
        _cached.clear()


def cached_weights() -> list[Tensor]:
    """Return every weight for which a value is cached."""
    return list(_cached)


class _Seen(NamedTuple):
    """Evidence that a tensor of ours, such as a mask, is still the same tensor and was not written."""

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


class WeightCache(Generic[Value]):
    """One cached value per weight. The cache does not keep the weight alive."""

    def __len__(self) -> int:
        return len(self.weights())

    def weights(self) -> list[Tensor]:
        """Return the weights that have a cached value."""
        return [weight for weight, entries in _cached.items() if self in entries]

    def get(
        self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable, derive: Callable[[], Value]
    ) -> Value:
        """Return the cached value, or compute it with `derive`; the value must not reference the weight.

        Args:
            weight, others: tensors that the value depends on; see `is_cacheable`.
            how: everything else that the value depends on.
            derive: computes the value.
        """
        entry = self._find(weight, others, how)
        if entry is None:
            content = content_at_rest()
            assert content is not None
            # Tensors made in inference mode have no version counter.
            with torch.inference_mode(False), torch.no_grad():
                entry = _Entry(content, tuple(map(_seen, others)), how, derive())
                _cached.setdefault(weight, {})[self] = entry
        value: Value = entry.value
        return value

    def has(self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable) -> bool:
        """Return whether `get` would find a cached value."""
        return self._find(weight, others, how) is not None

    def __contains__(self, weight: Tensor) -> bool:
        return self in _cached.get(weight, {})

    def clear(self) -> None:
        for weight in self.weights():
            self.forget(weight)

    def forget(self, weight: Tensor | None) -> None:
        """Free the cached value of a weight, if there is one."""
        if weight is not None and _cached.data:
            _cached.get(weight, {}).pop(self, None)

    def _find(self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable) -> _Entry | None:
        entry: _Entry | None = _cached.get(weight, {}).get(self)
        return entry if entry is not None and entry.is_of(content_at_rest(), others, how) else None


def is_cacheable(weight: Tensor, *others: Tensor | None) -> bool:
    """Return whether values of a weight may be cached: it does not change and is not a view, which one call creates.

    `others` are tensors of ours, whose version counters show every write.
    """
    if torch.compiler.is_compiling() or content_at_rest() is None or type(weight) not in PLAIN or weight._is_view():
        return False
    return all(x is None or (type(x) in PLAIN and not x.is_inference()) for x in others)


def _is_same(seen: _Seen | None, x: Tensor | None) -> bool:
    return x is None if seen is None else x is not None and seen.is_of(x)


def _seen(x: Tensor | None) -> _Seen | None:
    return None if x is None else _Seen(x.data_ptr(), x._version, x.stride())
