"""What is derived from a weight, kept between calls while a layer runs without gradients.

It is derived again once the weight was written. The version counter shows most writes, but not those of fused
optimizers: a call with gradients and an optimizer's step forget what is kept. Nor does it show writes through `.data`,
for which a sample of the elements is compared, on the CPU: on a GPU every call would have to wait for that.
"""

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from itertools import starmap
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nmcompile.ir.at_rest import are_weights_at_rest

SAMPLES = 64
PLAIN = Tensor, nn.Parameter
Value = TypeVar("Value")

_all: "weakref.WeakSet[Kept[Any]]" = weakref.WeakSet()


def forget(weights: Sequence[Tensor]) -> None:
    """Free everything that is kept of these weights, which may change unseen.

    Shards (DTensors) do not say which tensor they are a part of: with one among them, all that is kept is freed.
    """
    for kept in [kept for kept in _all if len(kept)]:
        if all(type(weight) in PLAIN for weight in weights):
            for weight in weights:
                kept.forget(weight)
        else:
            kept.clear()


class _Seen(NamedTuple):
    """What a tensor looked like."""

    address: int
    version: int
    strides: tuple[int, ...]
    sample: Tensor

    def is_of(self, x: Tensor) -> bool:
        same = (self.address, self.version, self.strides) == (x.data_ptr(), x._version, x.stride())
        return same and (x.is_cuda or torch.equal(self.sample, _sample(x)))


class _Entry(NamedTuple):
    sources: tuple[_Seen | None, ...]
    how: Hashable
    value: Any

    def is_of(self, sources: tuple[Tensor | None, ...], how: Hashable) -> bool:
        if self.how != how or len(self.sources) != len(sources):
            return False
        return all(starmap(_is_same, zip(self.sources, sources, strict=True)))


class Kept(Generic[Value]):
    """One value for each weight, which does not keep the weight alive."""

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()
        _all.add(self)

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable, derive: Callable[[], Value]
    ) -> Value:
        """What is kept, or what `derive` gives now, which must not hold the weight.

        Args:
            weight, others: what the value depends on; see `can_keep`.
            how: what else it depends on.
        """
        entry = self._find(weight, others, how)
        if entry is None:
            # What is made in inference mode has no version counter.
            with torch.inference_mode(False), torch.no_grad():
                sources = tuple(map(_seen, (weight, *others)))
                entry = self._entries[weight] = _Entry(sources, how, derive())
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
        """Free what is kept of a weight, if anything is."""
        if weight is not None:
            self._entries.pop(weight, None)

    def _find(self, weight: Tensor, others: tuple[Tensor | None, ...], how: Hashable) -> _Entry | None:
        entry: _Entry | None = self._entries.get(weight)
        return entry if entry is not None and entry.is_of((weight, *others), how) else None


def can_keep(*sources: Tensor | None, device: str = "cpu") -> bool:
    """Whether weights are at rest, and these are plain tensors on that kind of device whose writes can be noticed."""
    if torch.compiler.is_compiling() or not are_weights_at_rest():
        return False
    return all(x is None or (type(x) in PLAIN and x.device.type == device and not x.is_inference()) for x in sources)


def _is_same(seen: _Seen | None, x: Tensor | None) -> bool:
    return x is None if seen is None else x is not None and seen.is_of(x)


def _seen(x: Tensor | None) -> _Seen | None:
    return None if x is None else _Seen(x.data_ptr(), x._version, x.stride(), _sample(x).clone())


def _sample(x: Tensor) -> Tensor:
    """Elements from all over the memory of a tensor without gaps; of others the first."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    count = min(SAMPLES, x.numel(), max(reach, 0))  # an expanded tensor reaches less far than it has elements
    return x.detach().as_strided((count,), (_distance(reach, max(1, count)),))


@lru_cache
def _distance(reach: int, count: int) -> int:
    """Between samples. With a divisor in common all might lie in one column, and its feature may never be on."""
    return next(d for d in range(max(1, reach // count), 0, -1) if math.gcd(d, reach) == 1)
