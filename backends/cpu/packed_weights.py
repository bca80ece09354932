"""A cache of packed weights, for layers that run without gradients."""

from torch import Tensor

from nmcompile.native import kernels
from nmcompile.weight_cache import WeightCache, is_cacheable

Packs = list["kernels.PackedSparse | None"]
"""Packed operands of the GEMMs of a layer's groups; empty before the first of them runs."""

_kept: WeightCache[Packs] = WeightCache()


def kept_packs(weight: Tensor, mask: Tensor | None, groups: int = 1) -> Packs | None:
    """Return the cache entry for the packed forms of a weight; None if the weight is about to change."""
    return _kept.get(weight, (mask,), groups, list) if is_cacheable(weight, mask) else None


def forget_packs(weight: Tensor | None) -> None:
    """Free the cached forms of a weight, if any: the dense kernel was found to be faster."""
    _kept.forget(weight)
