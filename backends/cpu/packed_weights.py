"""Packed weights that are kept between calls, while a layer runs without gradients.

A weight is packed again once it was written. The version counter shows most writes; those through `.data` it does not,
so a sample of the elements is compared too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmcompile.ir.at_rest import are_weights_at_rest

SAMPLES = 64
Packs = list[Any]
"""The packed operands of the GEMMs that a layer's groups are; empty before the first of them runs."""


class _Seen(NamedTuple):
    """What a weight or mask looked like."""

    address: int
    version: int
    strides: tuple[int, ...]
    sample: Tensor

    def is_of(self, x: Tensor) -> bool:
        same = (self.address, self.version, self.strides) == (x.data_ptr(), x._version, x.stride())
        return same and torch.equal(self.sample, _sample(x))


class _Entry(NamedTuple):
    weight: _Seen
    mask: _Seen | None
    groups: int
    packs: Packs

    def is_of(self, weight: Tensor, mask: Tensor | None, groups: int) -> bool:
        if groups != self.groups or (mask is None) != (self.mask is None):
            return False
        return self.weight.is_of(weight) and (mask is None or self.mask is None or self.mask.is_of(mask))


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept_packs(weight: Tensor, mask: Tensor | None, groups: int = 1) -> Packs | None:
    """Where the packed forms of a weight are kept; None where the weight is about to change."""
    if not are_weights_at_rest() or weight.is_inference() or (mask is not None and mask.is_inference()):
        return None
    entry: _Entry | None = _kept.get(weight)
    if entry is None or not entry.is_of(weight, mask, groups):
        seen = None if mask is None else _seen(mask)
        entry = _kept[weight] = _Entry(_seen(weight), seen, groups, [])
    return entry.packs


def forget_packs(weight: Tensor | None) -> None:
    """Free what is kept of a weight, if anything is: the dense kernel was found to be faster."""
    if weight in _kept:
        del _kept[weight]


def _seen(x: Tensor) -> _Seen:
    return _Seen(x.data_ptr(), x._version, x.stride(), _sample(x).clone())


def _sample(x: Tensor) -> Tensor:
    """Elements from all over the memory of a tensor without gaps; of others the first."""
    count = min(SAMPLES, x.numel())
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.detach().as_strided((count,), (reach // max(1, count),))
